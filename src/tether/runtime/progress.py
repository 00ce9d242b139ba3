"""Progress of a run: a bar with the time left on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from tether.types import Metrics

SHOWN = ("reward", "kl", "accuracy", "eval/accuracy", "loss", "entropy", "completions/mean_length", "step_time")
"""The figures on the line, where a row has them; a narrow terminal cuts off the last ones."""
SHORT = {"generate": "gen", "reference": "ref", "advantage": "adv"}
"""Shorter names of phases."""


def figures(metrics: Metrics) -> str:
    """``reward 0.53  kl 2.1  step_time 9.1  gen 41% update 57%``: the figures, then the phases."""
    shown = [f"{name.removeprefix('completions/')} {metrics[name]:.3g}" for name in SHOWN if name in metrics]
    return "  ".join([*shown, *filter(None, [split(metrics)])])


def split(metrics: Metrics) -> str:
    """The share of the step that each phase took: ``gen 41% score 3% ref 12% adv 0% update 44%``; "" for one phase."""
    shares = [
        f"{SHORT.get(phase, phase)} {seconds / metrics['step_time']:.0%}"
        for name, seconds in metrics.items()
        if (phase := name.removeprefix("time/")) != name
    ]
    return " ".join(shares) if len(shares) > 1 else ""


class ProgressLine:
    """``with ProgressLine("ppo", 100) as progress: progress.advance(metrics)``."""

    def __init__(self, title: str, total: int, *, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, 0, quiet
        self.before = 0
        """Steps done before this session began."""
        self.started = time.monotonic()
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> ProgressLine:
        if self.console.is_terminal and not self.quiet:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=self.console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, figures="")
        return self

    def start_from(self, step: int) -> None:
        """``step`` steps were done before this session; to be called before the first :meth:`advance`."""
        self.done = self.before = step

    def advance(self, metrics: Metrics) -> None:
        """One step is done, with these figures."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, figures=figures(metrics))
        elif not self.quiet:
            left = (time.monotonic() - self.started) / (self.done - self.before) * (self.total - self.done)
            print(
                f"{self.title} {self.done}/{self.total}  {figures(metrics)}  left {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
