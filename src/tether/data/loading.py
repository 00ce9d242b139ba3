"""Every row of a source checked and encoded, many at a time, before any is used."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from tether.data.checks import (
    DROPPED,
    OVERLONG,
    TRUNCATED,
    UNCUT,
    UNEMBEDDED,
    DataReport,
    OnBadRows,
    SourceReport,
    refusal,
    sequences,
)
from tether.data.encoding import Encoder, Written, splits_at_spaces
from tether.data.memory import Source
from tether.data.reading import BadRow, Row, RowError, read_rows
from tether.errors import DataError
from tether.types import Demonstration, PreferencePair, Prompt
from tether.untrusted import printable

Overlong = Literal["fail", "drop", "truncate"]
"""What happens to a row that does not fit the model's context; ``truncate`` cuts its prompt on the left."""

Record = TypeVar("Record", Prompt, PreferencePair, Demonstration)

NONE: Mapping[int, str] = MappingProxyType({})
"""No tokens."""
ROWS, CHARACTERS = 512, 2**21
"""Rows and characters that are encoded together, at most."""
FIRST, EVERY = 5.0, 10.0
"""Seconds until the first line of progress, and between lines."""


@dataclass(frozen=True)
class Draft(Generic[Record]):
    """A row whose texts are still to be encoded."""

    texts: tuple[Written, ...]
    build: Callable[[Encoder], Record]
    """The record, from an encoder that knows the texts. May raise :class:`RowError`."""
    notes: tuple[str, ...] = ()
    """Kinds of findings."""
    never_cut: tuple[str, ...] = ()
    """The parts of the texts that truncating leaves whole."""
    shortened: bool = False
    """Whether the texts are without a part of a prompt that does not fit (:mod:`tether.data.shortening`)."""


def unchanged(row: Row) -> Row:
    return row


@dataclass(frozen=True)
class Kind(Generic[Record]):
    """How rows of one kind become records that fit the context."""

    parse: Callable[[Row], Draft[Record]]
    length: Callable[[Record], int]
    """Tokens that must fit the context."""
    cut: Callable[[Record], Record | None]
    """The record with a shorter prompt, or None if that cannot make it fit."""
    of: str
    """What ``length`` counts."""
    context: int
    overlong: Overlong
    unembedded: Mapping[int, str] = field(default_factory=lambda: NONE)
    """Ids for which the model has no embedding, and their tokens."""


def load_records(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind[Record],
    *,
    on_bad_rows: OnBadRows,
    report: DataReport | None,
    each: Callable[[Row], Row] = unchanged,
) -> list[Record]:
    """Check every row, then raise or return."""
    rows = read_rows(source)
    report = DataReport() if report is None else report
    found = SourceReport(str(source), len(rows))
    report.sources.append(found)
    encoder = Encoder(tokenizer, by_words=splits_at_spaces(tokenizer))
    kept: list[Record] = []
    refused: list[BadRow] = []
    drafts = ((row, draft(row, kind, encoder, each)) for row in rows)
    for part in in_parts(drafts, Progress(str(source), len(rows), quiet=report.quiet)):
        encoder.prepare(text for _, made in part if isinstance(made, Draft) for text in made.texts)
        for row, made in part:
            record = made if isinstance(made, BadRow) else finish(row, made, kind, encoder, found)
            if not isinstance(record, BadRow):
                assert isinstance(row, Row)  # only a row that could be read becomes a record
                report.keep(record, row, found)
                kept.append(record)
            elif record.kind == OVERLONG or (record.kind != DROPPED and on_bad_rows == "fail"):
                refused.append(record)
            else:
                found.skip(record)
    return _complete(kept, refused, found, kind.context)


def draft(
    row: Row | BadRow, kind: Kind[Record], encoder: Encoder, each: Callable[[Row], Row]
) -> Draft[Record] | BadRow:
    """The row with its texts, none of which is far too long."""
    if isinstance(row, BadRow):
        return row
    try:
        made = kind.parse(each(row))
    except RowError as error:
        return BadRow(row.where, error.kind, str(error), row.values)
    texts = made.never_cut if kind.overlong == "truncate" else [written.text for written in made.texts]
    for text in texts:
        if encoder.certainly_longer(text, kind.context):
            reason = f"{kind.of}, of {len(text)} characters, take more tokens than the model's context of"
            return too_long(row, f"{reason} {kind.context}", kind.overlong)
    return made


def finish(
    row: Row | BadRow, made: Draft[Record], kind: Kind[Record], encoder: Encoder, found: SourceReport
) -> Record | BadRow:
    """The record of a draft, cut to the context if that is wanted; its findings go to ``found``."""
    assert isinstance(row, Row)  # only a row that could be read has a draft
    try:
        record = made.build(encoder)
    except RowError as error:
        return BadRow(row.where, error.kind, str(error), row.values)
    if kind.length(record) > kind.context:
        shorter = kind.cut(record) if kind.overlong == "truncate" else None
        if shorter is None:
            taken = f"{'over ' * made.shortened}{kind.length(record)}"
            reason = f"{kind.of} take {taken} tokens and the model's context is {kind.context}"
            return too_long(row, reason, kind.overlong)
    else:
        shorter = record
    lacking = (
        next((i for ids in sequences(shorter) for i in ids if i in kind.unembedded), None) if kind.unembedded else None
    )
    if lacking is not None:
        reason = f"holds {kind.unembedded[lacking]!r}, for which the model has no embedding"
        return BadRow(row.where, UNEMBEDDED, reason, row.values)
    if shorter is not record:
        found.find(TRUNCATED, row.where)
    for note in made.notes:
        found.find(note, row.where)
    return shorter


def too_long(row: Row, reason: str, overlong: Overlong) -> BadRow:
    """The verdict on a row that does not fit the context."""
    if overlong == "truncate":
        return BadRow(row.where, UNCUT, f"{reason}, and cutting the prompt cannot make it fit", row.values)
    return BadRow(row.where, OVERLONG if overlong == "fail" else DROPPED, reason, row.values)


class Progress:
    """Says from time to time how many rows of a large source are done: on a terminal in one place, else in lines."""

    def __init__(self, source: str, total: int, *, quiet: bool) -> None:
        self.source, self.total, self.quiet = source, total, quiet
        self.started = time.monotonic()
        self.next = self.started + FIRST
        self.said = False

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or now < self.next or not done:
            return
        self.next, self.said = now + EVERY, True
        left = (now - self.started) / done * (self.total - done)
        self._say(f"{printable(self.source)}: {done} of {self.total} rows, left {left:.0f} s")

    def end(self) -> None:
        if self.said:
            self._say("", last=True)

    def _say(self, line: str, *, last: bool = False) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif not last:
            print(line, file=sys.stderr, flush=True)


Item = tuple[Row | BadRow, Draft[Record] | BadRow]


def in_parts(items: Iterable[Item[Record]], progress: Progress) -> Iterator[list[Item[Record]]]:
    """``items`` in lists of at most :data:`ROWS`, and of about :data:`CHARACTERS` or a single item."""
    part: list[Item[Record]] = []
    size = done = 0
    for item in items:
        own = sum(len(written.text) for written in item[1].texts) if isinstance(item[1], Draft) else 0
        if part and (len(part) == ROWS or size + own > CHARACTERS):
            yield part
            done += len(part)
            progress.at(done)
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield part
    progress.end()


def _complete(kept: list[Record], refused: Sequence[BadRow], found: SourceReport, context: int) -> list[Record]:
    """The records, unless a row was refused or none is left."""
    if refused:
        raise refusal(refused, found.rows)
    if not kept and set(found.findings) == {DROPPED}:
        raise DataError(f"every row is longer than the model's context of {context} tokens", where=found.source)
    if not kept:
        raise DataError(f"no row can be used: {found}; the first: {found.skipped[0].reason}", where=found.source)
    return kept
