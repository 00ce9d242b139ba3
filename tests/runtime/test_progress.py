"""A table above a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from tether.runtime import progress
from tether.runtime.progress import Columns, ProgressLine, clock, figures, is_terminal, number, shares, shown, split

ROW = {
    "step": 1.0,
    "reward": 0.5312,
    "kl": 2.0,
    "eval/accuracy": 0.75,
    "completions/mean_length": 12.5,
    "grad_norm": 9.0,
}
PHASES = {
    "step_time": 10.0, "time/generate": 4.06, "time/score": 0.3, "time/reference": 1.1, "time/advantage": 0.01,
    "time/update": 4.4, "flops/update": 1e9, "memory/peak_gib": 1.0,
}  # fmt: skip
STEP = {"reward": 0.5312, "kl": 2.0, "loss": 0.01, "entropy": 3.25, "completions/mean_length": 12.5, **PHASES}
"""What PPO and GRPO show of a step."""


def test_one_phase_is_not_split():
    assert split({"step_time": 2.0, "time/update": 1.0}) == ""
    assert split({"step_time": 2.0, "time/update": 1.0, "time/eval": 0.5}) == "upd 50% eval 25%"
    assert shares({"step_time": 2.0, "time/update": 1.0, "time/eval": 0.5}) == {"upd": 0.5, "eval": 0.25}


def test_the_figures_that_matter_under_names_that_differ():
    assert figures(ROW) == "reward 0.531  kl 2  eval/accuracy 0.75  mean_length 12.5"
    assert figures({**PHASES, "loss": 2.0}) == "loss 2  step_time 10  gen 41% score 3% ref 11% adv 0% upd 44%"
    assert figures({"accuracy": 0.5, "eval/accuracy": 1.0}) == "accuracy 0.5  eval/accuracy 1"


def test_a_loss_is_progress_only_where_nothing_is_rewarded():
    assert shown({"loss": 1.0, "reward": 0.0}) == ["reward"]
    assert shown({"loss": 1.0, "accuracy": 0.0}) == ["accuracy", "loss"]


def test_an_evaluated_step_shows_its_judges_and_not_the_parts_that_are_trained_on():
    row = {
        "reward": 1.0,
        "entropy": 2.0,
        "eval/reward": 0.5,
        "eval/rewards/trained": 0.5,
        "eval/rewards/judge_of_tone": 0.25,
        "eval/rewards_ci95/judge_of_tone": 0.1,
    }
    assert shown(row) == ["reward", "eval/reward", "eval/rewards/judge_of_tone", "entropy"]
    columns = Columns().joined({"reward": 1.0, "entropy": 2.0}).joined(row)
    assert [text for text, _ in columns.heading_cells(9)][1:5] == ["reward", "eval rew", "judge_of_ton", "entropy"]


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.53125, 3, "0.531"),
        (-12.25, 3, "-12.250"),
        (0.0, 3, "0.000"),
        (0.0001, 3, "1.0e-04"),  # not as 0.000
        (12345.678, 3, "1.2e+04"),
        (-1e7, 1, "-1.0e+07"),
        (12.54, 1, "12.5"),
        (None, 3, ""),
    ],
)
def test_a_number_of_at_most_eight_characters(value, decimals, text):
    assert number(value, decimals) == text
    assert len(text) <= 8


def test_seconds_as_a_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 125, 3725)] == ["0:00", "1:00", "2:05", "1:02:05"]


def test_columns_are_aligned_and_fit_80():
    columns = Columns().joined(STEP)
    heading, row = columns.heading(1000), columns.row(12, 1000, STEP)
    assert " ".join(heading.split()) == "step reward kl entropy length seconds gen% score% ref% adv% upd%"
    assert " ".join(row.split()) == "12/1000 0.531 2.000 3.250 12.5 10.0 41 3 11 0 44"
    assert len(heading) == len(row) <= 80
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in (heading, row)]
    assert ends[0] == ends[1]


def test_a_figure_that_some_rows_have_gets_a_column_and_blanks():
    first = Columns().joined({"accuracy": 0.5, "loss": 0.7})
    both = first.joined({"accuracy": 0.6, "eval/accuracy": 0.75})
    assert both.figures == ("accuracy", "eval/accuracy", "loss")
    assert both.joined({"accuracy": 0.1}) == both
    assert both.row(3, 9, {"accuracy": 0.5, "loss": 0.7}).split() == ["3/9", "0.500", "0.700"]
    assert both.row(3, 9, {"accuracy": 0.5}).index("0.500") == both.row(3, 9, {"accuracy": 0.5, "loss": 1}).index("0.5")


def test_what_does_not_fit_is_left_out_whole():
    many = {**STEP, "accuracy": 0.5, "eval/accuracy": 0.5, "eval/loss": 0.5}
    columns = Columns().joined(many)
    assert len(columns.heading(100)) <= 80
    assert len(columns.row(5, 100, many)) == len(columns.heading(100))
    assert columns.row(5, 100, many).split()[0] == "5/100"


def test_a_plain_line_a_step_off_a_terminal(capsys):
    with ProgressLine("ppo", 2) as line:
        line.advance(ROW)
        line.advance(ROW)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert re.fullmatch(r"ppo 1/2  .*reward 0\.531.*left \d+ s", first)
    assert second.startswith("ppo 2/2")
    assert second.endswith("left 0 s")


def test_nothing_when_quiet(capsys):
    with ProgressLine("ppo", 1, quiet=True) as line:
        line.advance(ROW)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"TERM": "xterm-color", "JPY_PARENT_PID": "7", "FORCE_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm-color", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}, False),
    ],
)
def test_a_cell_of_a_notebook_is_no_terminal(stream, environment, expected):
    assert is_terminal(stream, environment) is expected


def on_terminal(title: str, total: int, *, width: int = 80) -> ProgressLine:
    line = ProgressLine(title, total)
    line.terminal = Console(file=sys.stderr, force_terminal=True, width=width)
    return line


def rows_of(text: str) -> list[str]:
    """The lines that a terminal keeps: without the bar, which is drawn over, and without colours."""
    kept = [line.rsplit("\r", 1)[-1].rsplit("\x1b[2K", 1)[-1] for line in text.split("\n")]
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in kept]
    return [line for line in plain if re.match(r" *(step|\d+/\d+) ", line)]


@pytest.mark.parametrize("raises", [False, True])
def test_every_step_stays_on_a_terminal_and_an_error_takes_the_bar_down(raises, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 2)
    line = on_terminal("ppo", 4)
    try:
        with line:
            for _ in range(3):
                line.advance(STEP)
            print("grpo step 3: an alarm", file=sys.stderr)  # stays whole beside the bar
            assert line.bar is not None
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert not line.bar.live.is_started
    written = capsys.readouterr().err
    assert [row.split()[0] for row in rows_of(written)] == ["step", "1/4", "2/4", "step", "3/4"]
    assert max(map(len, rows_of(written))) <= 80
    assert "grpo step 3: an alarm" in written
    for part in ("ppo", "3/4", "left"):
        assert part in written


def test_a_narrow_terminal_cuts_rows_off(capsys):
    with on_terminal("ppo", 2, width=40) as line:
        line.advance(STEP)
    assert {len(row) for row in rows_of(capsys.readouterr().err)} == {40}
