"""The one path from text to token ids.

A prompt is encoded with the special tokens that its tokenizer puts in front (BOS), and none at the end. A completion is
what the tokenizer gives for prompt and completion *together*, without the prompt's ids; where the prompt's ids are not
a prefix of the whole (a merge across the boundary), the completion is encoded on its own, as the middle of a text.
Every completion to learn from ends with EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.reading import RowError
from tether.errors import ModelError
from tether.types import Message

Text = str | Sequence[Message]
"""Plain text, or a conversation."""


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion in training data."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so a completion could never end", where=tokenizer.name_or_path
        )
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
    """Ids of ``text`` with the tokenizer's leading special tokens and without a trailing EOS.

    A text that already begins with the BOS gets one BOS, not two.
    """
    ids = list(tokenizer(text)["input_ids"])
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids.pop(0)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_whole(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Ids of a text that holds prompt and completion, ending with EOS."""
    if isinstance(text, str):
        return [*encode(tokenizer, text), eos_id(tokenizer)]
    return end_with_eos(tokenizer, _encode_rendered(tokenizer, render(tokenizer, text, open_turn=False)))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool) -> str:
    """A conversation as the model's chat template writes it; ``open_turn`` ends it with the assistant's turn opened."""
    if not tokenizer.chat_template:
        raise RowError(
            "no chat template",
            f"the data holds conversations and the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="give plain text, or a model with a template",
        )
    turns = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))
    except Exception as error:  # templates are programs: they refuse roles out of order, and fail on unusual values
        reason = " ".join(str(error).split())
        raise RowError(
            "refused by the chat template",
            f"the chat template of {tokenizer.name_or_path} refuses the conversation ({reason})",
        ) from error


def special_front(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many of ``ids`` are special tokens that the tokenizer puts first (BOS)."""
    front = tokenizer("")["input_ids"]
    return next((i for i, (a, b) in enumerate(zip(front, ids, strict=False)) if a != b), min(len(front), len(ids)))


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], room: int) -> tuple[int, ...] | None:
    """``room`` of the ``ids``: the leading special tokens, and the last of the others.

    None where there is room for none of the others, or nothing to cut.
    """
    front = special_front(tokenizer, ids)
    if not front < room < len(ids):
        return None
    return (*ids[:front], *ids[len(ids) - room + front :])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Ids of a prompt that a completion will follow."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt)
    return _encode_rendered(tokenizer, render(tokenizer, prompt, open_turn=True))


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
            raise RowError(
                "refused by the chat template",
                f"the chat template of {tokenizer.name_or_path} does not extend a prompt when a turn is added, "
                "so prompt and completion cannot be told apart",
                hint="give plain text",
            )
        whole, tail = _encode_rendered(tokenizer, closed), closed[len(opened) :]
    else:
        raise RowError("wrong type", "prompt and completion must both be text or both be conversations")
    unmerged = whole[: len(prompt_ids)] == prompt_ids
    completion_ids = whole[len(prompt_ids) :] if unmerged else _encode_tail(tokenizer, tail)
    return prompt_ids, end_with_eos(tokenizer, completion_ids)


def end_with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """``ids`` up to their last EOS where only white space follows it, as in chat templates, else with EOS appended.

    An EOS that text follows does not end the sequence: it is a BOS of the same id, or closes an earlier turn.
    """
    eos = eos_id(tokenizer)
    end = len(ids) - ids[::-1].index(eos) if eos in ids else 0
    if end and not str(tokenizer.decode(ids[end:])).strip():
        return ids[:end]
    return [*ids, eos]


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a chat template's output, which already contains its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_tail(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another.

    Tokenizers like SentencePiece put a space in front of a text, but not after a line break.
    """
    anchor, anchored = _encode_rendered(tokenizer, "\n"), _encode_rendered(tokenizer, "\n" + text)
    if anchored[: len(anchor)] == anchor:
        return anchored[len(anchor) :]
    return _encode_rendered(tokenizer, text)
