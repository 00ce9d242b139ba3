"""The options in which runs differ, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from tether.looking.terminal import grid
from tether.report.comparison import differing_options
from tether.report.view import RunView
from tether.untrusted import printable, shortened

SIDE_BY_SIDE = 4
"""Runs whose options fit beside each other in 80 columns."""
LONGEST_VALUE = 60
"""Characters of the value of an option."""


def options_of(views: Sequence[RunView]) -> list[RenderableType]:
    """The options that differ: a table of few runs, and else a line per option. Those that only some of the commands
    have are counted."""
    rows = differing_options(views)
    shared = [row for row in rows if all(row[0] in view.config for view in views)]
    if not rows or len(views) < 2:
        return []
    names = [view.name for view in views]
    cut = [[row[0], *(shortened(value, LONGEST_VALUE) for value in row[1:])] for row in shared]
    parts: list[RenderableType] = []
    if shared and len(views) <= SIDE_BY_SIDE:
        parts.append(grid(["option", *names], cut, left=1 + len(names)))
    else:
        for option, *values in cut:
            pairs = "  ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            parts.append(Text(printable(f"{option}: {pairs}")))
    if only := len(rows) - len(shared):
        parts.append(Text(f"{only} more {'option is' if only == 1 else 'options are'} not options of all of them."))
    return parts
