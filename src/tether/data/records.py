"""Typed records from rows: prompts, preference pairs, demonstrations. Every row is checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from tether.data.reading import Row, read_rows
from tether.data.tokenise import (
    Text,
    encode_continuation,
    encode_prompt,
    encode_whole,
    is_conversation,
    render,
)
from tether.errors import DataError
from tether.types import Demonstration, PreferencePair, Prompt

Overlong = Literal["fail", "drop"]
"""What happens to a row that does not fit the model's context."""

Record = TypeVar("Record", Prompt, PreferencePair, Demonstration)


def load_prompts(
    source: str, tokenizer: PreTrainedTokenizerBase, *, context: int, max_new_tokens: int, overlong: Overlong = "fail"
) -> list[Prompt]:
    """Rows with a ``prompt`` (text or conversation); the other columns go to the reward functions.

    A prompt and its ``max_new_tokens`` have to fit the ``context`` of the model, in tokens.
    """

    def parse(row: Row) -> Prompt:
        prompt = _text(row, "prompt")
        ids = tuple(encode_prompt(tokenizer, prompt))
        columns = {name: value for name, value in row.values.items() if name != "prompt"}
        if isinstance(prompt, str):
            return Prompt(ids=ids, text=prompt, columns=columns)
        text = render(tokenizer, prompt, open_turn=True)
        return Prompt(ids=ids, text=text, messages=tuple(prompt), columns=columns)

    def length(prompt: Prompt) -> int:
        return len(prompt.ids) + max_new_tokens

    return _load(
        source, parse, length, context=context, overlong=overlong, of=f"prompt and {max_new_tokens} new tokens"
    )


def load_pairs(
    source: str, tokenizer: PreTrainedTokenizerBase, *, context: int, overlong: Overlong = "fail"
) -> list[PreferencePair]:
    """Rows with ``chosen`` and ``rejected``, a ``prompt`` or none, and a ``margin`` or none.

    Without a ``prompt``, or with one in text that the sides, being conversations, hold as a turn, it is implicit: the
    token ids that both sides begin with.
    """

    def parse(row: Row) -> PreferencePair:
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if chosen == rejected:
            raise DataError("chosen and rejected are equal, so the pair states no preference")
        prompt = _text(row, "prompt") if row.values.get("prompt") is not None else None
        if prompt is not None and not (_holds(chosen, prompt) and _holds(rejected, prompt)):
            prompt_ids, chosen_ids = encode_continuation(tokenizer, prompt, chosen)
            _, rejected_ids = encode_continuation(tokenizer, prompt, rejected)
        else:
            prompt_ids, chosen_ids, rejected_ids = _split_common_prefix(
                encode_whole(tokenizer, chosen), encode_whole(tokenizer, rejected)
            )
        if chosen_ids == rejected_ids:
            raise DataError("chosen and rejected have the same token ids, so no model can tell them apart")
        return PreferencePair(
            prompt_ids=tuple(prompt_ids),
            chosen_ids=tuple(chosen_ids),
            rejected_ids=tuple(rejected_ids),
            margin=_margin(row),
        )

    def length(pair: PreferencePair) -> int:
        return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))

    return _load(source, parse, length, context=context, overlong=overlong, of="longer side")


def load_demonstrations(
    source: str, tokenizer: PreTrainedTokenizerBase, *, context: int, overlong: Overlong = "fail"
) -> list[Demonstration]:
    """Rows with ``prompt`` and ``completion``, ``messages`` (the last turn is the completion) or ``text``."""

    def parse(row: Row) -> Demonstration:
        if "prompt" in row.values or "completion" in row.values:
            prompt_ids, completion_ids = encode_continuation(tokenizer, _text(row, "prompt"), _text(row, "completion"))
        elif "messages" in row.values:
            messages = _text(row, "messages")
            if isinstance(messages, str) or len(messages) < 2:
                raise DataError("messages must hold at least two turns, the last one to imitate")
            prompt_ids, completion_ids = encode_continuation(tokenizer, messages[:-1], messages[-1:])
        else:
            whole = encode_whole(tokenizer, _text(row, "text", instead="'text', or 'prompt' and 'completion'"))
            prompt_ids, completion_ids = whole[:1], whole[1:]
        return Demonstration(prompt_ids=tuple(prompt_ids), completion_ids=tuple(completion_ids))

    def length(demonstration: Demonstration) -> int:
        return len(demonstration.prompt_ids) + len(demonstration.completion_ids)

    return _load(source, parse, length, context=context, overlong=overlong, of="text")


def _load(
    source: str,
    parse: Callable[[Row], Record],
    length: Callable[[Record], int],
    *,
    context: int,
    overlong: Overlong,
    of: str,
) -> list[Record]:
    kept: list[Record] = []
    for row in read_rows(source):
        try:
            record = parse(row)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if length(record) <= context:
            kept.append(record)
        elif overlong == "fail":
            raise DataError(
                f"{row.where}: {of} take {length(record)} tokens and the model's context is {context}; "
                "shorten it, or leave such rows out with --overlong drop"
            )
    if not kept:
        raise DataError(f"{source}: every row is longer than the model's context of {context} tokens")
    return kept


def _text(row: Row, column: str, *, instead: str | None = None) -> Text:
    """The column's text or conversation, or an error that says what is wrong with it."""
    if column not in row.values:
        found = ", ".join(repr(name) for name in row.values) or "no columns"
        raise DataError(f"column {instead or repr(column)} is missing; the row has {found}")
    value = row.values[column]
    if isinstance(value, str):
        turns = [value]
        if not value.strip():
            raise DataError(f"{column} is empty")
    elif is_conversation(value):
        turns = [message["content"] for message in value]
        if not all(turn.strip() for turn in turns):
            raise DataError(f"{column} holds a turn without content")
    else:
        raise DataError(f"{column} must be text or a list of {{role, content}}, found {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise DataError(f"{column} holds half a character (a lone surrogate), which no tokenizer can read")
    return value if isinstance(value, str) else list(value)


def _margin(row: Row) -> float:
    """The row's margin, 0 where it has none."""
    margin = row.values.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"margin must be a finite number, found {margin!r}")
    return float(margin)


def _holds(side: Text, prompt: Text) -> bool:
    """Whether a prompt in text is a turn of a conversation already."""
    return not isinstance(side, str) and any(message["content"] == prompt for message in side[:-1])


def _split_common_prefix(a: list[int], b: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The shared beginning, at least one token short of either side, and what is left of each."""
    limit = min(len(a), len(b)) - 1
    same = next((i for i in range(limit) if a[i] != b[i]), limit)
    return a[:same], a[same:], b[same:]
