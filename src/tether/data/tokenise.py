"""The one path from text to token ids.

A prompt is encoded with whatever special tokens its tokenizer puts in front (BOS), and nothing behind. A completion is
what the tokenizer gives for prompt and completion *together*, less the prompt's ids; where the prompt's ids are not a
prefix of the whole (a merge across the boundary), the completion is encoded on its own. Every completion to learn from
ends with EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.errors import DataError, ModelError
from tether.types import Message

Text = str | Sequence[Message]
"""Plain text, or a conversation."""


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion in training data."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so a completion could never end")
    return int(tokenizer.eos_token_id)


def is_conversation(value: Any) -> bool:
    """Whether ``value`` is a non-empty list of {role, content}."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` with the tokenizer's leading special tokens and without a trailing EOS."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool) -> str:
    """A conversation as the model's chat template writes it; ``open_turn`` ends it where the assistant is to speak."""
    if not tokenizer.chat_template:
        raise DataError(
            f"the data holds conversations and the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "give plain text, or a model with a template"
        )
    turns = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Ids of a prompt that a completion will follow."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt)
    rendered = render(tokenizer, prompt, open_turn=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text
) -> tuple[list[int], list[int]]:
    """``(prompt ids, completion ids)``; the completion ends with EOS. Both are text, or both are conversations."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str) and isinstance(completion, str):
        whole, tail = encode(tokenizer, prompt + completion), completion
    elif not isinstance(prompt, str) and not isinstance(completion, str):
        opened = render(tokenizer, prompt, open_turn=True)
        closed = render(tokenizer, [*prompt, *completion], open_turn=False)
        if not closed.startswith(opened):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} does not extend a prompt when a turn is added, "
                "so prompt and completion cannot be told apart; give plain text"
            )
        whole, tail = list(tokenizer(closed, add_special_tokens=False)["input_ids"]), closed[len(opened) :]
    else:
        raise DataError("prompt and completion must both be text or both be conversations")
    if whole[: len(prompt_ids)] == prompt_ids:
        completion_ids = whole[len(prompt_ids) :]
    else:
        completion_ids = list(tokenizer(tail, add_special_tokens=False)["input_ids"])
    return prompt_ids, end_with_eos(completion_ids, eos_id(tokenizer))


def end_with_eos(ids: Sequence[int], eos: int) -> list[int]:
    """``ids`` up to and including its first EOS, or with one appended (chat templates write a line break after it)."""
    ids = list(ids)
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]
