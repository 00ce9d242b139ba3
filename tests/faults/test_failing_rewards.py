"""Reward functions that raise, hang or return what is no reward: the step is saved without an update."""

from __future__ import annotations

from pathlib import Path

import pytest

from commandline import REWARD, read_rows, tether
from comparison import difference
from faulty import ALWAYS, assert_intact, assert_resumes, failing, last_line
from runs import LINES

FAILING = {
    "raises": ("grpo", "raise KeyError('answer')", "reward 'fn' raised KeyError: 'answer' (r.py:6)"),
    "hangs": ("ppo", "import time; time.sleep(60)", "reward 'fn' did not return within 0.5 s"),
    "gives NaN": ("grpo", "return [float('nan')] * len(completions)", "reward 'fn' returned nan for completion 0"),
    "gives None": ("ppo", "return None", "reward 'fn' must return a list of values; it returned NoneType"),
    "gives too few": ("rejection-sampling", "return [1.0]", "reward 'fn' returned 1 values for "),
}


@pytest.mark.parametrize(("command", "body", "says"), FAILING.values(), ids=FAILING)
def test_a_reward_that_fails_saves_the_step_without_an_update(command, body, says, here, tiny, uninterrupted, capfd):
    line = f"{LINES[command]} {ALWAYS} --save-every 10 --reward-deadline 0.5s"
    (here / "r.py").write_text(failing(body, "== 3"))
    assert tether(f"{line} --model {tiny} --out out") == 2
    complaint = last_line(capfd)
    step = "round" if command == "rejection-sampling" else "step"
    assert complaint.startswith(f"tether {command}: {command} {step} 3: {says}")
    assert complaint.endswith("; resume with 'tether resume out'")
    assert assert_intact(here / "out")[-1] == "step_000002.01"
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2]
    (here / "r.py").write_text(REWARD)
    assert_resumes(Path("out"), uninterrupted(line))


@pytest.mark.parametrize("fault", [FAILING["hangs"], FAILING["gives None"]], ids=["hangs", "gives None"])
def test_a_reward_that_fails_in_the_first_step_leaves_nothing(fault, here, tiny, capfd):
    _, body, says = fault
    (here / "r.py").write_text(failing(body, "== 1"))
    assert tether(f"{LINES['ppo']} {ALWAYS} --reward-deadline 0.5s --model {tiny} --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether ppo: ppo step 1: {says}")
    assert not (here / "out").exists()


def test_a_reward_that_fails_twice_is_retried_with_the_same_numbers(here, tiny, uninterrupted, monkeypatch, capfd):
    monkeypatch.setattr("tether.rewards.supervision.FIRST_PAUSE", 0.01)
    line = f"{LINES['grpo']} {ALWAYS} --reward-retries 2"
    (here / "r.py").write_text(failing("raise OSError('no answer')", "in (3, 4)"))
    assert tether(f"{line} --model {tiny} --out out") == 0
    first, second = capfd.readouterr().err.splitlines()
    assert "OSError: no answer" in first
    assert "try 3 of 3" in second
    assert difference(here / "out", uninterrupted(line)) is None
