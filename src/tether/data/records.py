"""Typed records from rows: prompts, preference pairs, demonstrations. Every row is checked before any is used."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from tether.data.checks import (
    DROPPED,
    OVERLONG,
    TRUNCATED,
    UNCUT,
    DataReport,
    OnBadRows,
    SourceReport,
    refusal,
)
from tether.data.reading import BadRow, Row, RowError, read_rows
from tether.data.tokenise import (
    Text,
    cut_left,
    encode_continuation,
    encode_prompt,
    encode_whole,
    is_conversation,
    render,
    special_front,
)
from tether.errors import DataError
from tether.types import Demonstration, PreferencePair, Prompt

Overlong = Literal["fail", "drop", "truncate"]
"""What happens to a row that does not fit the model's context; ``truncate`` cuts its prompt on the left."""

Record = TypeVar("Record", Prompt, PreferencePair, Demonstration)


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
) -> list[Prompt]:
    """Rows with a ``prompt`` (text or conversation); the other columns go to the reward functions.

    A prompt and its ``max_new_tokens`` must fit the ``context`` of the model, in tokens. A prompt cut on the left keeps
    its leading special token (BOS); its ``text`` is that of the kept tokens, its ``messages`` are not cut.

    Findings go to ``report``. Raises :class:`DataError` that names the first row that cannot be used and counts the
    others; for ``skip`` and ``drop``, only if no row is left.
    """

    def parse(row: Row) -> Prompt:
        prompt = _text(row, "prompt")
        ids = tuple(encode_prompt(tokenizer, prompt))
        columns = {name: value for name, value in row.values.items() if name != "prompt"}
        if isinstance(prompt, str):
            return Prompt(ids=ids, text=prompt, columns=columns)
        text = render(tokenizer, prompt, open_turn=True)
        return Prompt(ids=ids, text=text, messages=tuple(prompt), columns=columns)

    def cut(prompt: Prompt, room: int) -> Prompt | None:
        ids = cut_left(tokenizer, prompt.ids, room)
        if ids is None:
            return None
        begin = special_front(tokenizer, ids) if prompt.messages is None else 0  # as in a prompt that is not cut
        return replace(prompt, ids=ids, text=str(tokenizer.decode(list(ids[begin:]))))

    return _load(
        source,
        parse,
        lambda prompt: len(prompt.ids) + max_new_tokens,
        lambda prompt: cut(prompt, context - max_new_tokens),
        of=f"prompt and {max_new_tokens} new tokens",
        context=context,
        overlong=overlong,
        on_bad_rows=on_bad_rows,
        report=report,
    )


def load_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
) -> list[PreferencePair]:
    """Rows with ``chosen`` and ``rejected``, and optionally ``prompt`` and ``margin``.

    The prompt is implicit, the token ids that both sides begin with, where there is no ``prompt`` or where both sides
    are conversations that contain its text as a turn. Otherwise as :func:`load_prompts`; the sides are never cut.
    """

    def parse(row: Row) -> PreferencePair:
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if chosen == rejected:
            raise RowError("equal sides", "chosen and rejected are equal, so the pair states no preference")
        prompt = _text(row, "prompt") if row.values.get("prompt") is not None else None
        if prompt is not None and not (_holds(chosen, prompt) and _holds(rejected, prompt)):
            prompt_ids, chosen_ids = encode_continuation(tokenizer, prompt, chosen)
            _, rejected_ids = encode_continuation(tokenizer, prompt, rejected)
        else:
            prompt_ids, chosen_ids, rejected_ids = _split_common_prefix(
                encode_whole(tokenizer, chosen), encode_whole(tokenizer, rejected)
            )
        if chosen_ids == rejected_ids:
            raise RowError(
                "equal sides", "chosen and rejected have the same token ids, so no model can distinguish them"
            )
        return PreferencePair(
            prompt_ids=tuple(prompt_ids),
            chosen_ids=tuple(chosen_ids),
            rejected_ids=tuple(rejected_ids),
            margin=_margin(row),
        )

    def sides(pair: PreferencePair) -> int:
        return max(len(pair.chosen_ids), len(pair.rejected_ids))

    def cut(pair: PreferencePair) -> PreferencePair | None:
        ids = cut_left(tokenizer, pair.prompt_ids, context - sides(pair))
        return None if ids is None else replace(pair, prompt_ids=ids)

    return _load(
        source,
        parse,
        lambda pair: len(pair.prompt_ids) + sides(pair),
        cut,
        of="prompt and longer side",
        context=context,
        overlong=overlong,
        on_bad_rows=on_bad_rows,
        report=report,
    )


def load_demonstrations(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
) -> list[Demonstration]:
    """Rows with ``prompt`` and ``completion``, ``messages`` (the last turn is the completion) or ``text``.

    Otherwise as :func:`load_prompts`; a completion, or a text, is never cut.
    """

    def parse(row: Row) -> Demonstration:
        if "prompt" in row.values or "completion" in row.values:
            prompt_ids, completion_ids = encode_continuation(tokenizer, _text(row, "prompt"), _text(row, "completion"))
        elif "messages" in row.values:
            messages = _text(row, "messages")
            if isinstance(messages, str) or len(messages) < 2:
                raise RowError("wrong type", "messages must hold at least two turns, the last one to imitate")
            prompt_ids, completion_ids = encode_continuation(tokenizer, messages[:-1], messages[-1:])
        else:
            whole = encode_whole(tokenizer, _text(row, "text", instead="'text', or 'prompt' and 'completion'"))
            prompt_ids, completion_ids = whole[:1], whole[1:]
        return Demonstration(prompt_ids=tuple(prompt_ids), completion_ids=tuple(completion_ids))

    def cut(one: Demonstration) -> Demonstration | None:
        ids = cut_left(tokenizer, one.prompt_ids, context - len(one.completion_ids))
        return None if ids is None else replace(one, prompt_ids=ids)

    return _load(
        source,
        parse,
        lambda one: len(one.prompt_ids) + len(one.completion_ids),
        cut,
        of="prompt and completion",
        context=context,
        overlong=overlong,
        on_bad_rows=on_bad_rows,
        report=report,
    )


def _load(
    source: str,
    parse: Callable[[Row], Record],
    length: Callable[[Record], int],
    cut: Callable[[Record], Record | None],
    *,
    of: str,
    context: int,
    overlong: Overlong,
    on_bad_rows: OnBadRows,
    report: DataReport | None,
) -> list[Record]:
    """Check every row, then raise or return; ``of`` names what ``length`` counts."""
    rows = read_rows(source)
    report = DataReport() if report is None else report
    found = SourceReport(source, len(rows))
    report.sources.append(found)

    def examine(row: Row) -> Record | BadRow:
        try:
            record = parse(row)
        except RowError as error:
            return BadRow(row.where, error.kind, str(error), row.values)
        if length(record) <= context:
            return record
        shorter = cut(record) if overlong == "truncate" else None
        if shorter is not None:
            found.find(TRUNCATED, row.where)
            return shorter
        reason = f"{of} take {length(record)} tokens and the model's context is {context}"
        if overlong == "truncate":
            return BadRow(row.where, UNCUT, f"{reason}, and cutting the prompt cannot make it fit", row.values)
        kind = OVERLONG if overlong == "fail" else DROPPED
        return BadRow(row.where, kind, reason, row.values)

    kept: list[Record] = []
    refused: list[BadRow] = []
    for row in rows:
        record = row if isinstance(row, BadRow) else examine(row)
        if isinstance(record, BadRow):
            if record.kind == OVERLONG or (record.kind != DROPPED and on_bad_rows == "fail"):
                refused.append(record)
            else:
                found.skip(record)
            continue
        assert isinstance(row, Row)  # only a row that could be read becomes a record
        report.keep(record, row, found)
        kept.append(record)
    if refused:
        raise refusal(refused, len(rows))
    if not kept and set(found.findings) == {DROPPED}:
        raise DataError(f"every row is longer than the model's context of {context} tokens", where=source)
    if not kept:
        raise DataError(f"no row can be used: {found}; the first: {found.skipped[0].reason}", where=source)
    return kept


def _text(row: Row, column: str, *, instead: str | None = None) -> Text:
    """The column's text or conversation. Raises :class:`RowError`."""
    if column not in row.values:
        names = [reprlib.repr(name) for name in list(row.values)[:8]] + ["..."] * (len(row.values) > 8)
        found = ", ".join(names) or "no columns"
        raise RowError("missing column", f"column {instead or repr(column)} is missing; the row has {found}")
    value = row.values[column]
    if isinstance(value, str):
        if not value.strip():
            raise RowError("empty", f"{column} is empty")
        return value
    if not is_conversation(value):
        found = type(value).__name__
        raise RowError("wrong type", f"{column} must be text or a list of {{role, content}}, found {found}")
    if not all(message["content"].strip() for message in value):
        raise RowError("empty", f"{column} holds a turn without content")
    return list(value)


def _margin(row: Row) -> float:
    """The row's margin, 0 where it has none."""
    margin = row.values.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not _finite(margin):
        raise RowError("wrong type", f"margin must be a finite number, found {reprlib.repr(margin)}")
    return float(margin)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def _holds(side: Text, prompt: Text) -> bool:
    """Whether a conversation already contains a prompt's text as a turn."""
    return not isinstance(side, str) and any(message["content"] == prompt for message in side[:-1])


def _split_common_prefix(a: list[int], b: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The common prefix, at least one token shorter than either side, and the rest of each."""
    limit = min(len(a), len(b)) - 1
    same = next((i for i in range(limit) if a[i] != b[i]), limit)
    return a[:same], a[same:], b[same:]
