"""``tether csv``: the metrics of one run or several as one table, for a spreadsheet, pandas or R."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tether.flags import POSITIONAL
from tether.looking.terminal import show
from tether.runtime.directory import read_metrics
from tether.runtime.files import is_stream, require_file, write_output
from tether.types import Metrics
from tether.untrusted import printable

RUN, STEP = "run", "step"


@dataclass(frozen=True, kw_only=True)
class CSV:
    """Write the metrics of one run or several as CSV, one line per step."""

    runs: tuple[str, ...] = field(metadata={POSITIONAL: "RUN"})
    """Run directories; with several of them, the first column names the run."""
    out: str | None = None
    """File, pipe or device to write to; the terminal unless given."""


def main(command: CSV) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    text = as_csv([(run, read_metrics(Path(run))) for run in command.runs])
    if command.out is None:
        show(text.removesuffix("\n"))
        return
    out = Path(command.out)
    write_output(out, text.encode())
    if not is_stream(out):
        show(str(out))


def as_csv(runs: Sequence[tuple[str, Sequence[Metrics]]]) -> str:
    """Rows of metrics as CSV, with a column for each metric that any row has, in the order in which they are found.
    A cell is empty where the row has no such metric.

    >>> as_csv([("a", [{"step": 1.0, "reward": 0.5}, {"step": 2.0, "reward": 1.0, "eval/reward": 0.25}])])
    'step,reward,eval/reward\\n1,0.5,\\n2,1.0,0.25\\n'
    """
    names = dict.fromkeys(name for _, rows in runs for row in rows for name in row)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    first = [RUN] if len(runs) > 1 else []
    writer.writerow([*first, *map(printable, names)])
    for run, rows in runs:
        label = [printable(run)] if first else []
        for row in rows:
            writer.writerow([*label, *(cell(row, name) for name in names)])
    return out.getvalue()


def cell(row: Metrics, name: str) -> str | float:
    """A metric of a row; "" where it has none."""
    value = row.get(name)
    if value is None:
        return ""
    return int(value) if name == STEP and float(value).is_integer() else value
