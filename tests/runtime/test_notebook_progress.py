"""What a run shows in the cell of a notebook."""

from __future__ import annotations

import sys
import types

import pytest

from tether.runtime import notebook, progress
from tether.runtime.notebook_progress import INTERVAL, ROWS, Cell, Standing, cell_of_kernel
from tether.runtime.progress import ProgressLine

STANDING = Standing(
    title="grpo<b>", done=3, total=9, note="0:12 left", heading=["step", "reward"], rows=[["3/9", "0.500"]]
)


class Screen:
    """Takes the place of ``IPython.display.display``."""

    def __init__(self):
        self.drawings: list[dict[str, str]] = []
        self.cells = 0

    def display(self, bundle, *, raw, display_id):
        assert raw
        assert display_id is True
        self.cells += 1
        self.update(bundle, raw=raw)
        return self

    def update(self, bundle, *, raw):
        assert raw
        self.drawings.append(bundle)


@pytest.fixture
def kernel(monkeypatch):
    """IPython, as a kernel has it."""
    screen = Screen()
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setattr(ipython, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(display, "display", screen.display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    screen.shell = shell
    return screen


def test_html_and_text():
    page, text = STANDING.as_html(), STANDING.as_text()
    assert "<progress value='3' max='9'" in page
    assert "grpo&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<th style='text-align:right'>reward</th></tr></thead>" in page
    assert "<td style='text-align:right'>0.500</td>" in page
    assert text.splitlines() == ["grpo<b> 3/9  0:12 left", "     step     reward", "      3/9      0.500"]


def test_a_cell_is_drawn_over_and_not_too_often():
    screen, now = Screen(), [0.0]
    cell = Cell(screen.display, clock=lambda: now[0])
    for seconds in (0.0, INTERVAL / 2, INTERVAL, 1.2 * INTERVAL):
        now[0] = seconds
        cell.show(STANDING)
    assert len(screen.drawings) == 2
    cell.show(STANDING, last=True)
    assert (screen.cells, len(screen.drawings)) == (1, 3)


def test_there_is_a_cell_in_a_kernel_alone(kernel, monkeypatch):
    assert cell_of_kernel() is not None
    del kernel.shell.kernel  # IPython on a terminal
    assert cell_of_kernel() is None
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)  # imported, not running
    assert cell_of_kernel() is None
    monkeypatch.delitem(sys.modules, "IPython")
    assert cell_of_kernel() is None
    assert "IPython" not in sys.modules


def test_a_run_draws_its_last_steps(kernel, capsys):
    with ProgressLine("grpo", ROWS + 2) as line:
        line.advance({"reward": 0.5})
        assert "left" in kernel.drawings[-1]["text/plain"]
        for step in range(ROWS + 1):
            line.advance({"reward": 0.1 * step, "eval/loss": 1.0})
    last = kernel.drawings[-1]
    assert kernel.cells == 1
    assert last["text/plain"].startswith(f"grpo {ROWS + 2}/{ROWS + 2}  in 0:00\n")
    assert [line.split()[0] for line in last["text/plain"].splitlines()[2:]] == [
        f"{step}/{ROWS + 2}" for step in range(3, ROWS + 3)
    ]
    assert "eval loss" in last["text/html"]
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_stopped_says_so(kernel):
    line = ProgressLine("grpo", 9)
    line.advance({"reward": 0.5})
    line.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert kernel.drawings[-1]["text/plain"].startswith("grpo 1/9  stopped in 0:00\n")


def test_a_quiet_run_and_one_without_a_step_draw_nothing(kernel):
    with ProgressLine("grpo", 9, quiet=True) as line:
        line.advance({"reward": 0.5})
    with ProgressLine("grpo", 9):
        pass
    assert kernel.drawings == []


def test_formats_that_are_chosen_are_kept(monkeypatch):
    """The picture itself is looked at in a real kernel."""
    figures = pytest.importorskip("matplotlib.figure")
    tools = pytest.importorskip("IPython.core.pylabtools")
    chosen: list[object] = []
    monkeypatch.setattr(tools, "select_figure_formats", lambda _, formats: chosen.append(formats))
    png = types.SimpleNamespace(type_printers={})
    shell = types.SimpleNamespace(display_formatter=types.SimpleNamespace(formatters={"image/png": png}))
    monkeypatch.setattr(notebook, "shell_of_kernel", lambda: None)
    notebook.show_figures()
    assert chosen == []
    monkeypatch.setattr(notebook, "shell_of_kernel", lambda: shell)
    notebook.show_figures()
    assert chosen == [{"png"}]
    png.type_printers[figures.Figure] = repr
    notebook.show_figures()
    assert chosen == [{"png"}]


def test_a_terminal_line_is_what_it_was(capsys):
    assert progress.cell_of_kernel() is None
    with ProgressLine("grpo", 1) as line:
        line.advance({"reward": 0.5})
    assert capsys.readouterr().err.startswith("grpo 1/1  reward 0.5")
