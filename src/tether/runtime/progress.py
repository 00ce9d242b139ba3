"""What a run shows while it works: a bar with the time left on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from tether.types import Metrics

SHOWN = ("reward", "kl", "accuracy", "eval/accuracy", "loss", "entropy", "completions/mean_length", "step_time")
"""The figures worth a place on the line, where a row has them; a narrow terminal cuts off the last ones."""


def figures(metrics: Metrics) -> str:
    """``reward 0.53  kl 2.1``."""
    return "  ".join(f"{name.removeprefix('completions/')} {metrics[name]:.3g}" for name in SHOWN if name in metrics)


class ProgressLine:
    """``with ProgressLine("ppo", 100) as progress: progress.advance(metrics)``."""

    def __init__(self, title: str, total: int, *, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, 0, quiet
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
            self.task = self.bar.add_task(self.title, total=self.total, figures="")
        return self

    def advance(self, metrics: Metrics) -> None:
        """One step is done, with these figures."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, figures=figures(metrics))
        elif not self.quiet:
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
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
