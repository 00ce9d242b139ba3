"""Completions of a run, and how a terminal and a notebook show them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

from tether.report.completions import Sample
from tether.untrusted import printable

TEXT = "text-align:left;white-space:pre-wrap"


@dataclass(frozen=True)
class Samples:
    """Completions with their prompts and scores: a sequence that shows as a table."""

    rows: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> Sample:
        return self.rows[number]

    def __repr__(self) -> str:
        return "\n".join(f"{one.score:+.3f}  {flat(one.prompt)} | {flat(one.completion)}" for one in self.rows)

    def _repr_html_(self) -> str:
        heading = "".join(f"<th style='{TEXT}'>{name}</th>" for name in ("score", "prompt", "completion"))
        return f"<table><tr>{heading}</tr>{''.join(map(line_of, self.rows))}</table>"


def flat(text: str) -> str:
    return printable(" ".join(text.split()))


def line_of(sample: Sample) -> str:
    """A line of the table, in which nothing of the texts is markup."""
    cells = (f"{sample.score:+.3f}", sample.prompt, sample.completion)
    return "<tr>" + "".join(f"<td style='{TEXT}'>{html.escape(printable(cell))}</td>" for cell in cells) + "</tr>"
