"""Rewards at a scale where rounding and signal cannot be told apart: they do not train, and the run says so."""

import pytest
import torch

from commandline import read_rows, tether, workspace
from helpers import group, scored
from tether.monitor.flat_rewards import PATIENCE, FlatRewards
from tether.ops.advantages import standardised, zero_variance
from tether.types import StepResult


def result(*totals):
    groups = [scored(group([0, 5 + i], [[6, 1]] * len(row)), row) for i, row in enumerate(totals)]
    return StepResult(metrics={}, groups=tuple(groups))


def message(*results):
    """What the monitor says in as many steps as it is patient for."""
    monitor = FlatRewards()
    alarms = [alarm for step in range(PATIENCE) for alarm in monitor.watch(step + 1, results[step % len(results)])]
    return alarms[0].message if alarms else ""


@pytest.mark.parametrize("scale", [1e-7, 1e-9, 1e-30])
def test_rewards_that_are_too_small(scale):
    told = result([0.0, scale], [3 * scale, 5 * scale])
    said = message(told)
    assert f"rewards that differ by at most {2 * scale:.1e}" in said
    assert "count as equal below a standard deviation of 1e-06" in said
    assert f"give the reward a weight (--reward SPEC={0.1 / (2 * scale):.0e})" in said
    weight = float(f"{0.1 / (2 * scale):.0e}")  # the remedy works
    assert not zero_variance(torch.tensor([[0.0, scale * weight]])).any()


@pytest.mark.parametrize(("offset", "spread"), [(1e6, 0.1), (-1e6, 1.0), (1e9, 50.0)])
def test_rewards_with_a_large_offset(offset, spread):
    said = message(result([offset, offset + spread], [offset, offset + spread / 2]))
    assert f"rewards that differ by at most {spread:.1e}" in said
    assert f"rewards of this size (up to {abs(offset):.1e}) count as equal" in said
    assert "if it is not rounding, subtract what all rewards have in common" in said


def test_rewards_that_are_equal_are_called_equal():
    for flat in (result([0.0, 0.0]), result([0.1 + 0.2, 0.3]), result([1e6, 1e6]), result([1e-7, 1e-7])):
        assert "had equal rewards, so comparing them teaches nothing" in message(flat)


@pytest.mark.parametrize("totals", [[0.0, 1.0], [0.0, 1e-5], [100.0, 101.0], [1e6, 1e6 + 4], [-0.5, -0.25]])
def test_ordinary_rewards_train(totals):
    assert message(result(totals)) == ""
    assert standardised(torch.tensor([totals]))[0].abs().max() > 1e-2


def test_one_step_that_can_be_compared_starts_the_count_anew():
    small, told = result([0.0, 1e-7]), result([0.0, 1.0])
    monitor = FlatRewards()
    steps = [small] * 4 + [told] + [result([2.0, 2.0])] * 5
    alarms = [alarm.message for step, one in enumerate(steps, 1) for alarm in monitor.watch(step, one)]
    assert len(alarms) == 1
    assert "in steps 6 to 10 all completions of each prompt had equal rewards" in alarms[0]


@pytest.mark.parametrize(
    ("value", "said"), [("len(c) % 5 * 1e-7", "give the reward a weight"), ("1e6 + len(c) % 5 / 100", "subtract what")]
)
def test_a_run_says_so(tmp_path, tiny, monkeypatch, value, said):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "s.py").write_text(f"def fn(completions, **_):\n    return [{value} for c in completions]\n")
    line = "grpo --prompts p.jsonl --reward s.py:fn --prompts-per-step 2 --group-size 4 --steps 6 --max-new-tokens 8"
    assert tether(line, "--quiet", "--model", tiny, "--out", "run") == 0
    (alarm,) = read_rows(tmp_path / "run" / "alarms.jsonl")
    assert alarm["step"] == PATIENCE
    assert said in alarm["message"]
