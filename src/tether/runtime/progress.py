"""Progress of a run: on a terminal a table of its steps above a bar with the time left, in a notebook the same in the
output of its cell, elsewhere one plain line per step."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from tether.runtime.notebook_progress import ROWS, Cell, Standing, cell_of_kernel
from tether.types import Metrics

SHOWN = (
    "reward",
    "kl",
    "accuracy",
    "eval/accuracy",
    "eval/loss",
    "eval/reward",
    "loss",
    "entropy",
    "completions/mean_length",
)
"""The figures of a step, where its row has them. The loss of a step of PPO or GRPO is none: it does not fall as the
policy gets better, so that a row with a reward shows no loss."""
SHORT = {"generate": "gen", "reference": "ref", "advantage": "adv", "update": "upd"}
"""Shorter names of phases."""
HEADINGS = {
    "accuracy": "acc",
    "eval/accuracy": "eval acc",
    "eval/loss": "eval loss",
    "eval/reward": "eval rew",
    "completions/mean_length": "length",
}
"""Shorter names of figures, over the columns of the table."""
DECIMALS = {"completions/mean_length": 1, "step_time": 1}
"""Digits after the point, 3 for other figures."""
TIME, PHASE = "step_time", "time/"
WIDTH = 80
"""Columns of the table, at most."""
EVERY = 20
"""Rows of the table between its headings."""


JUDGED, JUDGED_CI95 = "eval/rewards/", "eval/rewards_ci95/"
"""How the names begin of a reward on the held-out prompts, and of its interval, which a ``--eval-reward`` has alone."""


def place(name: str) -> float:
    """Where a figure stands in a line: as in :data:`SHOWN`, a judge behind ``eval/reward``."""
    return SHOWN.index(name) if name in SHOWN else SHOWN.index("eval/reward") + 0.5


def shown(metrics: Metrics) -> list[str]:
    """The names of the figures that matter, of those that a row has."""
    names = [name for name in SHOWN if name in metrics and not (name == "loss" and "reward" in metrics)]
    judges = [JUDGED + name.removeprefix(JUDGED_CI95) for name in metrics if name.startswith(JUDGED_CI95)]
    return sorted([*names, *judges], key=place)


def figures(metrics: Metrics) -> str:
    """``reward 0.53  kl 2.1  step_time 9.1  gen 41% upd 57%``: the figures, then the phases."""
    names = [*shown(metrics), *([TIME] if TIME in metrics else [])]
    texts = [f"{name.removeprefix('completions/')} {metrics[name]:.3g}" for name in names]
    return "  ".join([*texts, *filter(None, [split(metrics)])])


def shares(metrics: Metrics) -> dict[str, float]:
    """The share of the step that each phase took, by its short name; of at least two phases."""
    found = {
        SHORT.get(phase, phase): seconds / metrics[TIME]
        for name, seconds in metrics.items()
        if (phase := name.removeprefix(PHASE)) != name
    }
    return found if len(found) > 1 else {}


def split(metrics: Metrics) -> str:
    """``gen 41% score 3% ref 12% adv 0% upd 44%``; "" for one phase."""
    return " ".join(f"{phase} {share:.0%}" for phase, share in shares(metrics).items())


@dataclass(frozen=True)
class Columns:
    """The columns of the table of steps: figures by their metrics, then the share of each phase in percent."""

    figures: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()

    def joined(self, metrics: Metrics) -> Columns:
        """These, and what a row has beside them; in the order of :data:`SHOWN` and of the row."""
        named = {*self.figures, *shown(metrics)}
        return Columns(
            tuple(sorted(named, key=lambda name: (place(name), name))),
            tuple(dict.fromkeys([*self.phases, *shares(metrics)])),
        )

    def heading(self, total: int) -> str:
        return fitted(self.heading_cells(total))

    def row(self, step: int, total: int, metrics: Metrics) -> str:
        return fitted(self.row_cells(step, total, metrics))

    def heading_cells(self, total: int) -> list[tuple[str, int]]:
        """Texts with the widths of their columns."""
        cells = [(heading(name), cell_width(name)) for name in self.figures]
        phases = [(f"{phase}%", phase_width(phase)) for phase in self.phases]
        return [("step", step_width(total)), *cells, ("seconds", 8), *phases]

    def row_cells(self, step: int, total: int, metrics: Metrics) -> list[tuple[str, int]]:
        """The figures of a step, blank where it lacks one."""
        cells = [(number(metrics.get(name), DECIMALS.get(name, 3)), cell_width(name)) for name in self.figures]
        share = shares(metrics)
        phases = [(f"{100 * share[one]:.0f}" if one in share else "", phase_width(one)) for one in self.phases]
        seconds = number(metrics.get(TIME), DECIMALS[TIME])
        return [(f"{step}/{total}", step_width(total)), *cells, (seconds, 8), *phases]


def step_width(total: int) -> int:
    return 2 * len(str(total)) + 1


def cell_width(name: str) -> int:
    return max(9, len(heading(name)) + 2)


def heading(name: str) -> str:
    """What stands over the column of a figure; a long name of a judge loses its end."""
    return HEADINGS.get(name) or name.removeprefix(JUDGED)[:12]


def phase_width(phase: str) -> int:
    return len(phase) + 2


def fitted(cells: Sequence[tuple[str, int]]) -> str:
    """Cells of (text, width), on the right of each, as far as they fit."""
    line = ""
    for text, width in cells:
        if len(line) + width > WIDTH:
            break
        line += text.rjust(width)
    return line


def number(value: float | None, decimals: int) -> str:
    """A figure of at most eight characters: ``0.531``, ``-12.250``, ``1.3e+07``; "" for None."""
    if value is None:
        return ""
    plain = f"{value:.{decimals}f}"
    return plain if len(plain) <= 8 and (float(plain) or not value) else f"{value:.1e}"


def is_terminal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ``stream`` is a terminal that can redraw a line. A command in a cell of a notebook (``!tether ...``)
    writes to one that cannot; a kernel leaves its marks in the environment of its commands."""
    in_a_cell = "JPY_PARENT_PID" in environment or "inline" in environment.get("MPLBACKEND", "")
    return stream.isatty() and environment.get("TERM") != "dumb" and not in_a_cell


def clock(seconds: float) -> str:
    """``1:02:05``, or ``2:05`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """``with ProgressLine("ppo", 100) as progress: progress.advance(metrics)``."""

    def __init__(self, title: str, total: int, *, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, 0, quiet
        self.before = 0
        """Steps done before this session began."""
        self.started = time.monotonic()
        self.terminal: Console | None = Console(file=sys.stderr, highlight=False) if is_terminal(sys.stderr) else None
        self.cell: Cell | None = cell_of_kernel()
        self.recent: deque[tuple[int, Metrics]] = deque(maxlen=ROWS)
        """The last steps, for the cell of a notebook."""
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.columns = Columns()
        self.rows = 0

    def __enter__(self) -> ProgressLine:
        self.started = time.monotonic()
        if self.terminal is not None and not self.quiet:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=36),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.terminal,
                refresh_per_second=4,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, left="")
        return self

    def start_from(self, step: int) -> None:
        """``step`` steps were done before this session; to be called before the first :meth:`advance`."""
        self.done = self.before = step

    @property
    def left(self) -> float:
        """Seconds until the last step, at the speed of this session."""
        return (time.monotonic() - self.started) / (self.done - self.before) * (self.total - self.done)

    def advance(self, metrics: Metrics) -> None:
        """One step is done, with these figures."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self._tabulate(metrics, self.bar.console)
            self.bar.update(self.task, completed=self.done, left=f"{clock(self.left)} left")
        elif self.cell is not None and not self.quiet:
            self.columns = self.columns.joined(metrics)
            self.recent.append((self.done, metrics))
            self.cell.show(self._standing(f"{clock(self.left)} left"))
        elif not self.quiet:
            line = f"{self.title} {self.done}/{self.total}  {figures(metrics)}  left {self.left:.0f} s"
            print(line, file=sys.stderr, flush=True)

    def _standing(self, note: str) -> Standing:
        heading = [text for text, _ in self.columns.heading_cells(self.total)]
        rows = [
            [text for text, _ in self.columns.row_cells(step, self.total, metrics)] for step, metrics in self.recent
        ]
        return Standing(title=self.title, done=self.done, total=self.total, note=note, heading=heading, rows=rows)

    def _tabulate(self, metrics: Metrics, console: Console) -> None:
        """The step as a row of the table; its headings first, where they are due or there are new ones."""
        columns = self.columns.joined(metrics)
        if columns != self.columns or self.rows % EVERY == 0:
            self.columns, self.rows = columns, 0
            console.print(Text(columns.heading(self.total), style="bold"), no_wrap=True, crop=True)
        self.rows += 1
        console.print(Text(columns.row(self.done, self.total, metrics)), no_wrap=True, crop=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.cell is not None and self.recent:
            note = f"in {clock(time.monotonic() - self.started)}"
            self.cell.show(self._standing(note if kind is None else f"stopped {note}"), last=True)
