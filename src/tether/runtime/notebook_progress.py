"""Progress of a run in the output of a notebook's cell: a bar over the table of the last steps, redrawn in place."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tether.runtime.notebook import shell_of_kernel
from tether.untrusted import printable

Bundle = dict[str, str]
"""The same content by media type."""

INTERVAL = 0.25
"""Seconds between two drawings, at least: a notebook keeps up with no more."""
ROWS = 10
"""Steps that the table shows."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands."""

    title: str
    done: int
    total: int
    note: str
    """``2:05 left``, or how it ended."""
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The cells of the last steps, under those of the heading."""

    def bundle(self) -> Bundle:
        """As HTML, and as text for what shows none."""
        return {"text/html": self.as_html(), "text/plain": self.as_text()}

    def as_text(self) -> str:
        lines = [f"{self.title} {self.done}/{self.total}  {self.note}"]
        lines += ["  ".join(f"{cell:>9}" for cell in row) for row in (self.heading, *self.rows)]
        return "\n".join(map(printable, lines))

    def as_html(self) -> str:
        """Without scripts and style sheets, in the colours of the notebook's theme."""
        heading, rows = line("th", self.heading), "".join(line("td", row) for row in self.rows)
        bar = f"<progress value='{self.done}' max='{self.total}' style='width:20em;vertical-align:middle'></progress>"
        table = f"<table><thead>{heading}</thead><tbody>{rows}</tbody></table>"
        return f"<div>{escaped(self.title)} {bar} {self.done}/{self.total} {escaped(self.note)}</div>{table}"


def line(tag: str, cells: Sequence[str]) -> str:
    """A line of a table."""
    return "<tr>" + "".join(f"<{tag} style='text-align:right'>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"


def escaped(text: str) -> str:
    return html.escape(printable(text))


class Cell:
    """The output of the cell that runs: :meth:`show` draws over what it drew before."""

    def __init__(self, display: Callable[..., Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.display, self.clock = display, clock
        self.handle: Any = None
        self.drawn = 0.0
        """When."""

    def show(self, standing: Standing, *, last: bool = False) -> None:
        """Draw, unless the drawing before was just now; the ``last`` one is always drawn."""
        now = self.clock()
        if self.handle is None:
            self.handle = self.display(standing.bundle(), raw=True, display_id=True)
        elif last or now - self.drawn >= INTERVAL:
            self.handle.update(standing.bundle(), raw=True)
        else:
            return
        self.drawn = now


def cell_of_kernel() -> Cell | None:
    """The output of the cell that runs, in the kernel of a notebook; None elsewhere."""
    if shell_of_kernel() is None:
        return None
    from IPython.display import display

    return Cell(display)
