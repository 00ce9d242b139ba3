"""TensorBoard: event files in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tether.runtime.json_text import to_json
from tether.trackers.rows import Cell, Ending, Row, TrackedRun
from tether.untrusted import printable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DIRECTORY = "tensorboard"
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~&])")


class TensorBoard:
    """Scalars per step, and texts: configuration, samples, alarms, summary."""

    rewinds = True
    where = ""
    writer: SummaryWriter

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides the events from this step on that sessions before this one left, if the first session gave a
        # step too: it takes the first one that it sees for the beginning
        self.writer = SummaryWriter(str(run.directory / DIRECTORY), purge_step=run.first)
        self.where = f"tensorboard --logdir {run.directory / DIRECTORY}"
        self.writer.add_text("config", code(to_json(run.config, indent=2)), 0)
        return {"directory": DIRECTORY}

    def log(self, row: Row) -> None:
        for name, value in row.metrics.items():
            self.writer.add_scalar(name, value, row.step)
        if row.samples:
            self.writer.add_text("samples", markdown_table(row.samples), row.step)
        for monitor, message in row.alarms:
            self.writer.add_text(f"alarms/{monitor}", escaped(message), row.step)

    def finish(self, ending: Ending) -> None:
        for name, value in ending.figures.items():
            self.writer.add_scalar(name, value, ending.step)
        self.writer.add_text("summary", code(to_json(ending.summary, indent=2)), ending.step)
        if ending.report:  # a page with a style of its own is no text for TensorBoard
            self.writer.add_text("report", escaped(str(ending.report)), ending.step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - an event file has no status
        self.writer.close()


def code(text: str) -> str:
    """``text`` as a Markdown block of code."""
    return "".join(f"    {printable(line)}\n" for line in text.splitlines())


def markdown_table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Rows with the same columns as a Markdown table in which no cell is markup."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([escaped(cell(row[name])) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Cell) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    """``text`` on one line, shown as it is where Markdown is read."""
    return _MARKUP.sub(r"\\\1", printable(text.replace("\n", " ↵ ")))
