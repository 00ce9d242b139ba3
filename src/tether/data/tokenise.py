"""The one path from text to token ids.

A prompt is encoded with the special tokens that its tokenizer puts in front (BOS), and none at the end. A completion is
what the tokenizer gives for prompt and completion *together*, without the prompt's ids; where the prompt's ids are not
a prefix of the whole (a merge across the boundary), the completion is encoded on its own, as the middle of a text.
Every completion to learn from ends with EOS.

A text is first written out (a conversation by its chat template), then encoded: many rows are written before all of
them are encoded together (:class:`tether.data.encoding.Encoder`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tether.data.conversations import PLAIN, Template, ends_with_model, joined, require_model_turn
from tether.data.encoding import Encoder, Written
from tether.data.reading import RowError
from tether.errors import ModelError
from tether.types import Message

Text = str | Sequence[Message]
"""Plain text, or a conversation."""

_HERE = "the-completion-begins-here"
"""Stands for a completion's text in a rendering."""
_OPENED_THINKING = re.compile(r"<think>\s*\Z")


class Continuation(NamedTuple):
    """A prompt, and prompt and completion together, as they are encoded."""

    opened: Written
    closed: Written

    @property
    def tail(self) -> str:
        return self.closed.text[len(self.opened.text) :]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a completion in training data."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so a completion could never end", where=tokenizer.name_or_path
        )
    return int(tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` with the tokenizer's leading special tokens and without a trailing EOS.

    A text that already begins with the BOS gets one BOS, not two.
    """
    return Encoder(tokenizer)(Written(text, True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Ids of a prompt that a completion will follow."""
    return Encoder(tokenizer)(write_prompt(tokenizer, prompt))


# ------------------------------------------------------------------------------------------------------- text to write


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool, template: Template = PLAIN
) -> str:
    """A conversation as the model's chat template writes it.

    ``open_turn`` ends it where the model is to continue: with the assistant's turn opened or, if the last turn is the
    model's already, with that turn not closed. A template that cannot open a turn is made to by what it writes before
    an assistant's text.
    """
    source = _template_source(tokenizer, template)
    if not open_turn:
        return _apply(tokenizer, messages, template)
    if ends_with_model(messages):
        if messages[-1].get("tool_calls"):
            raise RowError("not the model's turn", "a prompt cannot end with a tool call, which only its tool answers")
        return _apply(tokenizer, messages, template, continue_final_message=True)
    opened = _apply(tokenizer, messages, template, add_generation_prompt=True)
    if "add_generation_prompt" in source:
        return opened
    with_turn = _apply(tokenizer, [*messages, {"role": "assistant", "content": _HERE}], template)
    header = with_turn[: max(0, with_turn.find(_HERE, len(opened)))].rstrip(" ")
    return header if header.startswith(opened) and header[len(opened) :].strip() else opened


def write_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, template: Template = PLAIN) -> Written:
    """A prompt that a completion will follow."""
    if isinstance(prompt, str):
        return Written(prompt, True)
    return Written(render(tokenizer, prompt, open_turn=True, template=template), False)


def write_whole(tokenizer: PreTrainedTokenizerBase, text: Text, template: Template = PLAIN) -> Written:
    """A text that holds prompt and completion."""
    if isinstance(text, str):
        return Written(text, True)
    require_model_turn(text[-1], "the last turn")
    return Written(render(tokenizer, text, open_turn=False, template=template), False)


def write_continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, template: Template = PLAIN
) -> Continuation:
    """A prompt and its completion: both text, or both conversations.

    A template that opens the model's turn with ``<think>`` does not write that before an answer without reasoning; the
    prompt then ends before it.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return Continuation(Written(prompt, True), Written(prompt + completion, True))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("wrong type", "prompt and completion must both be text or both be conversations")
    require_model_turn(completion[0], "the completion's first turn")
    require_model_turn(completion[-1], "the last turn")
    opened = render(tokenizer, prompt, open_turn=True, template=template)
    closed = render(tokenizer, joined(prompt, completion), open_turn=False, template=template)
    if not closed.startswith(opened):
        opened = _OPENED_THINKING.sub("", opened)
    if not closed.startswith(opened):
        raise RowError(
            "refused by the chat template",
            f"the chat template of {tokenizer.name_or_path} does not extend a prompt when a turn is added, "
            "so prompt and completion cannot be told apart",
            hint="give plain text",
        )
    return Continuation(Written(opened, False), Written(closed, False))


def write_observation(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: Template = PLAIN) -> str:
    """What a chat template writes between the text of the model's turn and that of its next one, with ``turns`` between
    them. Raises :class:`RowError`."""
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _HERE}]
    written = render(tokenizer, [*before, *turns], open_turn=True, template=template)
    _, found, tail = written.partition(_HERE)
    if not found:
        raise RowError(
            "refused by the chat template",
            f"the chat template of {tokenizer.name_or_path} does not write the model's earlier turns as they are",
        )
    return tail


# ------------------------------------------------------------------------------------------------ from text to its ids


def whole_ids(encoder: Encoder, whole: Written) -> list[int]:
    """Ids of a text that holds prompt and completion, ending with EOS."""
    ids = encoder(whole)
    front = 1 if ids[:1] == [encoder.bos] else 0
    return ids[:front] + _ended(encoder, ids[front:])


def continuation_ids(encoder: Encoder, written: Continuation) -> tuple[list[int], list[int]]:
    """``(prompt ids, completion ids)``; the completion ends with EOS."""
    prompt_ids, whole = encoder(written.opened), encoder(written.closed)
    unmerged = whole[: len(prompt_ids)] == prompt_ids
    completion_ids = whole[len(prompt_ids) :] if unmerged else following_ids(encoder.tokenizer, written.tail)
    return prompt_ids, _ended(encoder, completion_ids)


def _ended(encoder: Encoder, ids: list[int]) -> list[int]:
    if encoder.eos is None or encoder.eos in ids:
        return end_with_eos(encoder.tokenizer, ids)
    return [*ids, encoder.eos]


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


def end_with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """``ids`` up to their last EOS where only white space follows it, as in chat templates, else with EOS appended.

    An EOS that text follows does not end the sequence: it is a BOS of the same id, or closes an earlier turn.
    """
    eos = eos_id(tokenizer)
    end = len(ids) - ids[::-1].index(eos) if eos in ids else 0
    if end and not str(tokenizer.decode(ids[end:])).strip():
        return ids[:end]
    return [*ids, eos]


def _template_source(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    if not tokenizer.chat_template:
        raise RowError(
            "no chat template",
            f"the data holds conversations and the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="give plain text, or a model with a template",
        )
    tools = None if template.tools is None else list(template.tools)
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except Exception as error:
        raise _refused(tokenizer, error) from error


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: Template, **how: bool) -> str:
    turns = [dict(message) for message in messages]
    given: dict[str, Any] = {**template.options, **how}
    if template.tools is not None:
        given["tools"] = list(template.tools)
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **given))
    except Exception as error:  # templates are programs: they refuse roles out of order, and fail on unusual values
        raise _refused(tokenizer, error) from error


def _refused(tokenizer: PreTrainedTokenizerBase, error: Exception) -> RowError:
    reason = " ".join(str(error).split())
    return RowError(
        "refused by the chat template",
        f"the chat template of {tokenizer.name_or_path} refuses the conversation ({reason})",
    )


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a chat template's output, which already contains its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def following_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another.

    Tokenizers like SentencePiece put a space in front of a text, but not after a line break.
    """
    anchor, anchored = _encode_rendered(tokenizer, "\n"), _encode_rendered(tokenizer, "\n" + text)
    if anchored[: len(anchor)] == anchor:
        return anchored[len(anchor) :]
    return _encode_rendered(tokenizer, text)
