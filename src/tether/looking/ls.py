"""``tether ls``: the runs below a directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tether.durations import in_words
from tether.errors import ConfigError, RunError, TetherError
from tether.flags import POSITIONAL
from tether.looking.options import options_of
from tether.looking.terminal import grid, rendered, show
from tether.report.state import state_of
from tether.report.view import RunView
from tether.runtime.directory import CONFIG, ROWS, SUMMARY
from tether.runtime.json_text import to_json

INNER = frozenset({"checkpoints", "journal", "model", "rollouts"})
"""Directories of a run that hold no runs."""
FIGURES = ("reward", "eval/reward", "kl", "accuracy", "eval/accuracy", "eval/loss")
"""What is shown of the newest rows; the loss where a run has none of them."""
MOST_WITH_OPTIONS = 8
"""Runs beyond which the options in which they differ are left out."""
UNWRAPPED = 10_000
"""Columns where the standard output is no terminal: a program that reads a line finds the whole name in it."""


@dataclass(frozen=True, kw_only=True)
class Ls:
    """List the runs below a directory: what they are, how far they got, and in which options they differ."""

    directory: str = field(default=".", metadata={POSITIONAL: "DIR"})
    """Directory to search."""
    depth: int = 3
    """How many directories deep to search."""
    json: bool = False
    """Print one JSON object per run."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"depth must be 0 or more": self.depth >= 0})


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run."""

    path: str
    """Relative to the directory that is listed."""
    command: str
    state: str
    """finished, running, stopped or interrupted, and why where that is known."""
    step: int
    """The newest step in ``metrics.jsonl``; 0 before the first."""
    total: int | None
    """Steps or rounds of the whole run; None where the data decide."""
    figures: Mapping[str, float]
    """The newest of :data:`FIGURES`."""
    age: float
    """Seconds since the run last wrote."""
    size: int
    """Bytes on disk."""
    view: RunView | None
    """None where the run cannot be read."""

    def as_row(self) -> dict[str, Any]:
        config = self.view.config if self.view is not None else {}
        return {**{name: value for name, value in vars(self).items() if name != "view"}, "config": config}


def main(command: Ls) -> None:
    top = Path(command.directory)
    if not top.is_dir():
        raise RunError("no such directory", where=top)
    runs = [listed(path, top) for path in run_directories(top, command.depth)]
    if command.json:
        show("\n".join(to_json(run.as_row(), ascii_only=True) for run in runs))
    elif runs:
        show(rendered(*in_full(runs), width=UNWRAPPED))
    else:
        show(rendered(Text(f"No runs within {command.depth} directories of {top}.")))


def run_directories(top: Path, depth: int) -> Iterator[Path]:
    """The directories with a ``config.yaml``, ``top`` itself too, at most ``depth`` deep, in the order of their names.
    Links are not followed."""
    if (top / CONFIG).is_file():
        yield top
    if depth > 0:
        try:
            inner = sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:
            return
        for path in inner:
            if path.name not in INNER and not path.name.startswith("."):
                yield from run_directories(path, depth - 1)


def listed(path: Path, top: Path) -> Listed:
    """What there is to say of the run in ``path``."""
    name = str(path.relative_to(top))
    written = [file.stat().st_mtime for file in (path / ROWS, path / SUMMARY, path / CONFIG) if file.exists()]
    age, size = max(0.0, time.time() - max(written, default=time.time())), size_of(path)
    try:
        view = RunView.read(path, name=name, samples=False)
        state = state_of(path, view)
    except TetherError as error:
        return Listed(
            path=name, command="?", state=f"unreadable: {error.message}", step=0, total=None, figures={}, age=age,
            size=size, view=None,
        )  # fmt: skip
    found = {metric: value for metric in FIGURES if (value := view.last(metric)) is not None}
    if not found and (loss := view.last("loss")) is not None:
        found = {"loss": loss}
    return Listed(
        path=name,
        command=view.command,
        state=state,
        step=view.step,
        total=view.total,
        figures=found,
        age=age,
        size=size,
        view=view,
    )


def size_of(path: Path) -> int:
    """Bytes of all files below a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                continue
    return total


def in_bytes(size: int) -> str:
    """``41 MB``, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size} {unit}"
        size = round(size / 1000)
    return f"{size} GB"


def in_full(runs: Sequence[Listed]) -> list[RenderableType]:
    """The table, and per command the options in which its runs differ."""
    cells = []
    for run in runs:
        steps = f"{run.step}/{run.total}" if run.total else str(run.step) if run.step else ""
        figures = "  ".join(f"{name} {round(value, 3) + 0.0:.3g}" for name, value in list(run.figures.items())[:2])
        cells.append([run.path, run.command, run.state, figures, steps, in_words(run.age), in_bytes(run.size)])
    parts: list[RenderableType] = [grid(["run", "command", "state", "last", "step", "age", "size"], cells, left=4)]
    if len(runs) > MOST_WITH_OPTIONS:
        limit = f"The options that differ are shown of at most {MOST_WITH_OPTIONS} runs; --json has all options."
        return [*parts, Text(limit)]
    for command in dict.fromkeys(run.command for run in runs):
        views = [run.view for run in runs if run.command == command and run.view is not None]
        if differing := options_of(views):
            parts += [Text(f"options of the {command} runs that differ"), *differing]
    return parts
