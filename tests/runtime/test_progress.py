"""Plain lines off a terminal, a bar on one, nothing when quiet."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from tether.runtime.progress import ProgressLine, figures, split

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


def test_one_phase_is_not_split():
    assert split({"step_time": 2.0, "time/update": 1.0}) == ""
    assert split({"step_time": 2.0, "time/update": 1.0, "time/eval": 0.5}) == "update 50% eval 25%"


def test_the_figures_that_matter_under_names_that_differ():
    assert figures(ROW) == "reward 0.531  kl 2  eval/accuracy 0.75  mean_length 12.5"
    assert figures({**PHASES, "loss": 2.0}) == "loss 2  step_time 10  gen 41% score 3% ref 11% adv 0% update 44%"
    assert figures({"accuracy": 0.5, "eval/accuracy": 1.0}) == "accuracy 0.5  eval/accuracy 1"


def test_a_plain_line_a_step_off_a_terminal(capsys):
    with ProgressLine("ppo", 2) as progress:
        progress.advance(ROW)
        progress.advance(ROW)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert re.fullmatch(r"ppo 1/2  .*reward 0\.531.*left \d+ s", first)
    assert second.startswith("ppo 2/2")
    assert second.endswith("left 0 s")


def test_nothing_when_quiet(capsys):
    with ProgressLine("ppo", 1, quiet=True) as progress:
        progress.advance(ROW)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("raises", [False, True])
def test_a_bar_on_a_narrow_terminal_which_an_error_takes_down(raises, capsys):
    progress = ProgressLine("ppo", 4)
    progress.console = Console(force_terminal=True, width=80, stderr=True)
    try:
        with progress:
            progress.advance(ROW)
            assert progress.bar is not None
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert progress.bar.finished is False
    assert not progress.bar.live.is_started
    shown = capsys.readouterr().err
    for part in ("ppo", "1/4", "-:--:--", "reward 0.531", "kl 2"):  # all of them fit
        assert part in shown
