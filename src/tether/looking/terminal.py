"""What the commands print: results on the standard output."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tether.errors import RunError
from tether.untrusted import printable

WIDTH = 80
"""Columns where the standard output is no terminal."""


def show(text: str) -> None:
    """Print the result of a command. Raises :class:`RunError` where the standard output takes no more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        raise
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror})", where="standard output") from error


def rendered(*parts: RenderableType, width: int = WIDTH) -> str:
    """``parts`` one below the other as text: with styles and as wide as the terminal where there is one, and else plain
    and ``width`` wide."""
    terminal = sys.stdout.isatty()
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        width=None if terminal else width,
        highlight=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, title: str = "") -> Table:
    """A table whose first ``left`` columns are text and wrap, and whose others are figures and do not. Every cell is
    made printable."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title or None, title_justify="left")
    for number, name in enumerate(header):
        text = number < left
        table.add_column(Text(printable(name)), justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
