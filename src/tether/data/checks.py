"""What was found in the rows of a command's data: how many of each kind, on which lines, and how they were handled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tether.data.fingerprint import digest, tokens_digest
from tether.data.reading import BadRow, Place, Row
from tether.errors import DataError
from tether.types import Demonstration, PreferencePair, Prompt
from tether.untrusted import printable

OnBadRows = Literal["fail", "skip"]
"""What happens to a row that cannot be used: it stops the command, or is left out and reported."""

Record = TypeVar("Record", Prompt, PreferencePair, Demonstration)

OVERLONG = "over-long"
DROPPED, TRUNCATED, UNCUT = "over-long: dropped", "over-long: truncated", "over-long: cannot be truncated"
DUPLICATE, HELD_OUT, UNEMBEDDED = "duplicates", "held out too", "token without embedding"
NAMED, LISTED = 3, 20
"""How many line numbers of one kind a message names, and :meth:`DataReport.as_dict` lists."""


@dataclass
class SourceReport:
    """One source: rows read, records kept, the places of the findings, and the rows that were left out."""

    source: str
    rows: int
    kept: int = 0
    findings: dict[str, list[Place]] = field(default_factory=dict)
    skipped: list[BadRow] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set, repr=False)
    """Digests of the records."""

    def find(self, kind: str, where: Place) -> None:
        self.findings.setdefault(kind, []).append(where)

    def skip(self, bad: BadRow) -> None:
        self.find(bad.kind, bad.where)
        self.skipped.append(bad)

    def __str__(self) -> str:
        """``4966 of 5000 rows; equal sides 34 (lines 17, 90, 131, ...)``."""
        found = [f"{kind} {len(places)} ({name_places(places)})" for kind, places in self.findings.items()]
        return "; ".join([f"{self.kept} of {self.rows} rows", *found])


@dataclass
class DataReport:
    """What was found in all sources of a command. Each call of a loader adds a source."""

    sources: list[SourceReport] = field(default_factory=list)
    quiet: bool = False
    """Whether loading shows no progress."""
    _origins: dict[int, tuple[Any, Row, SourceReport]] = field(default_factory=dict, repr=False)
    """By the ``id`` of each record. The record is stored too, so that the ``id`` is not reused."""

    def keep(self, record: Any, row: Row, source: SourceReport) -> None:
        """Remember where a record came from, and note whether its source already held an equal one."""
        content = digest(record)
        if content in source.seen:
            source.find(DUPLICATE, row.where)
        source.seen.add(content)
        self._origins[id(record)] = record, row, source
        source.kept += 1

    def origin(self, record: Any) -> tuple[Row, SourceReport]:
        """The row that a record was made from, and its source. The record must have been kept in this report."""
        _, row, source = self._origins[id(record)]
        return row, source

    def lines(self) -> list[str]:
        """One line per source in which something was found."""
        return [f"{source.source}: {source}" for source in self.sources if source.findings]

    def tell(self) -> None:
        """Print :meth:`lines` to the standard error."""
        for line in self.lines():
            print(printable(line), file=sys.stderr)

    def as_dict(self) -> list[dict[str, Any]]:
        """Counts, and the first lines or rows, for JSON: ``{source, rows, kept, findings: {kind: {count, at}}}``."""
        return [
            {
                "source": source.source,
                "rows": source.rows,
                "kept": source.kept,
                "findings": {
                    kind: {"count": len(places), "at": [place.number for place in places[:LISTED]]}
                    for kind, places in source.findings.items()
                },
            }
            for source in self.sources
        ]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The rows that were left out, for JSON: ``{where, kind, reason, row}``; a row is raw text if unreadable."""
        return [
            {"where": str(bad.where), "kind": bad.kind, "reason": bad.reason, "row": _plain(bad.content)}
            for source in self.sources
            for bad in source.skipped
        ]


def leaks(training: Sequence[Record], held_out: Sequence[Record]) -> dict[int, int]:
    """Index of each training record that is also held out -> index of the first held-out record equal to it.

    Records are equal if their tokens are: those of a prompt, of prompt and completion together, or of both sides of a
    pair in either order.
    """
    known: dict[frozenset[bytes], int] = {}
    for index, record in enumerate(held_out):
        known.setdefault(_content(record), index)
    return {i: known[content] for i, content in enumerate(map(_content, training)) if content in known}


def keep_apart(
    training: Sequence[Record], held_out: Sequence[Record], *, report: DataReport, on_bad_rows: OnBadRows = "fail"
) -> list[Record]:
    """The training records that are not also held out; both kinds were loaded with this ``report``.

    Raises :class:`DataError` that names the lines of both, for ``fail`` or where no training record is left.
    """
    reasons = {
        index: f"is held out too ({report.origin(held_out[other])[0].where})"
        for index, other in leaks(training, held_out).items()
    }
    return leave_out(training, reasons, HELD_OUT, report=report, on_bad_rows=on_bad_rows)


def keep_from_prompts(
    pairs: Sequence[PreferencePair], held_out: Sequence[Prompt], *, report: DataReport, on_bad_rows: OnBadRows = "fail"
) -> list[PreferencePair]:
    """The pairs whose prompt is none of the ``held_out`` ones; otherwise as :func:`keep_apart`."""
    known = {prompt.ids: report.origin(prompt)[0].where for prompt in reversed(held_out)}
    reasons = {
        index: f"its prompt is held out ({known[pair.prompt_ids]})"
        for index, pair in enumerate(pairs)
        if pair.prompt_ids in known
    }
    return leave_out(pairs, reasons, HELD_OUT, report=report, on_bad_rows=on_bad_rows)


def leave_out(
    records: Sequence[Record],
    reasons: Mapping[int, str],
    kind: str,
    *,
    report: DataReport,
    on_bad_rows: OnBadRows = "fail",
) -> list[Record]:
    """The records, loaded with this ``report``, without those at the indices of ``reasons``, which cannot be used.

    Raises :class:`DataError` that names the lines, for ``fail`` or where no record is left.
    """
    found: list[BadRow] = []
    for index, reason in reasons.items():
        row, source = report.origin(records[index])
        bad = BadRow(row.where, kind, reason, row.values)
        found.append(bad)
        if on_bad_rows == "skip":
            source.skip(bad)
            source.kept -= 1
    if found and (on_bad_rows == "fail" or len(reasons) == len(records)):
        raise refusal(found, len(records))
    return [record for index, record in enumerate(records) if index not in reasons]


def refusal(bad: Sequence[BadRow], rows: int) -> DataError:
    """The error for rows that cannot be used, of ``rows`` in all: the first one, how many more, and what to do."""
    first, *more = bad
    message = first.reason
    every = len(bad) == rows
    if every and more:
        message += f"; nor can any other of the {rows} rows be used"
    elif more:
        places = name_places([row.where for row in more])
        message += f"; {len(more)} more row{'s' * (len(more) > 1)} cannot be used ({places})"
    return DataError(message, where=first.where, hint=way_out(bad, every=every))


def way_out(bad: Sequence[BadRow], *, every: bool) -> str:
    """What to do about rows that cannot be used, in one command; ``every`` if there are no others. "" for nothing."""
    overlong = [row.kind == OVERLONG for row in bad]
    it, its = ("them", "their prompts") if len(bad) > 1 else ("it", "its prompt")
    if all(overlong):
        return f"leave {it} out with --overlong drop, or cut {its} with --overlong truncate"
    if any(overlong) and every:
        return "cut long prompts with --overlong truncate, and leave the other rows out with --on-bad-rows skip"
    if any(overlong):
        instead = "--overlong truncate cuts long prompts instead"
        return f"leave {it} out with --overlong drop and --on-bad-rows skip ({instead})"
    return "" if every else f"leave {it} out with --on-bad-rows skip"


def name_places(places: Sequence[Place]) -> str:
    """``lines 17, 90, 131, ...``."""
    numbers = [str(place.number) for place in places[:NAMED]] + ["..."] * (len(places) > NAMED)
    return f"{places[0].unit}{'s' * (len(places) > 1)} {', '.join(numbers)}"


def _content(record: Prompt | PreferencePair | Demonstration) -> frozenset[bytes]:
    return frozenset(tokens_digest(tokens) for tokens in sequences(record))


def sequences(record: Prompt | PreferencePair | Demonstration) -> Iterator[tuple[int, ...]]:
    """The token sequences that a model would read."""
    if isinstance(record, Prompt):
        yield record.ids
    elif isinstance(record, PreferencePair):
        yield record.prompt_ids + record.chosen_ids
        yield record.prompt_ids + record.rejected_ids
    else:
        yield record.prompt_ids + record.completion_ids


def _plain(content: Mapping[str, Any] | str) -> Any:
    """A row as JSON can hold it; what JSON does not know, such as a date or bytes, as its ``repr``."""
    return content if isinstance(content, str) else json.loads(json.dumps(content, default=repr))
