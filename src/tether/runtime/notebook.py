"""Whether this process is the kernel of a notebook, in Jupyter or VS Code, and what it has to be told."""

from __future__ import annotations

import sys
from typing import Any


def shell_of_kernel() -> Any:
    """IPython's shell, where this process is a kernel; else None. IPython is not imported where it is not running."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None


def show_figures() -> None:
    """Have the kernel show figures of matplotlib as pictures. It does not before pyplot has made one of its own; where
    formats are chosen already, those are kept."""
    shell = shell_of_kernel()
    if shell is None:
        return
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib.figure import Figure

    if not any(Figure in formatter.type_printers for formatter in shell.display_formatter.formatters.values()):
        select_figure_formats(shell, {"png"})
