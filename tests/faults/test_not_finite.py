"""Gradients that are not finite: the optimizer step is skipped and counted, and too many in a row stop the run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from commandline import read_rows, tether
from faulty import ALWAYS, assert_intact, assert_resumes, last_line
from runs import LINES
from tether.algorithms import dpo, epochs, grpo, policy_update, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.optimise import apply

ALGORITHMS = {
    "sft": sft,
    "reward": reward_model,
    "dpo": dpo,
    "rejection-sampling": rejection_sampling,
    "ppo": ppo,
    "grpo": grpo,
}


@pytest.fixture
def spoiled(monkeypatch):
    """Make the gradient NaN in those backward passes, counted from 1, for which ``bad`` holds."""

    @contextlib.contextmanager
    def gradients(command, bad):
        states, passes = ALGORITHMS[command].State, []
        create = states.create

        def hook(gradient):
            passes.append(1)
            return gradient * float("nan") if bad(len(passes)) else gradient

        def hooked(*arguments, **options):
            next(arguments[0].parameters()).register_hook(hook)
            return create(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(states, "create", staticmethod(hooked))
            yield

    return gradients


@pytest.fixture
def skipped(monkeypatch):
    """For each optimizer step that was skipped, whether weights and optimizer state stayed as they were."""
    found = []

    def tensors(optimizer):
        moments = [entry for state in optimizer.state.values() for entry in state.values()]
        weights = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        return [tensor.clone() for tensor in [*weights, *moments]]

    def watched(guard, optimizer, *given, **options):
        before, skipped = tensors(optimizer), guard.skipped
        try:
            return apply(guard, optimizer, *given, **options)
        finally:
            if guard.skipped > skipped:
                found.append(all(map(torch.equal, before, tensors(optimizer))))

    for module in (policy_update, epochs):
        monkeypatch.setattr(module, "apply", watched)
    return found


MIDDLE = dict.fromkeys(LINES, 6) | {"rejection-sampling": 4}
"""An optimizer step that is not one of the run's first; of rejection sampling, the first of its second round."""


@pytest.mark.parametrize("command", LINES)
def test_one_gradient_that_is_not_finite_skips_one_optimizer_step(command, here, tiny, spoiled, skipped):
    with spoiled(command, lambda n: n == MIDDLE[command]):
        assert tether(f"{LINES[command]} {ALWAYS} --model {tiny} --out out") == 0
    assert skipped == [True]
    rows = read_rows(here / "out" / "metrics.jsonl")
    if command == "rejection-sampling":
        assert [row["sft/skipped_updates"] for row in rows] == [0, 1, 0]
        assert [row["skipped_updates"] for row in read_rows(here / "out" / "sft.jsonl")] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    else:
        assert rows[0]["skipped_updates"] == 0
        assert rows[-1]["skipped_updates"] == 1


@pytest.mark.parametrize("command", LINES)
def test_gradients_that_stay_not_finite_stop_the_run(command, here, tiny, uninterrupted, spoiled, skipped, capfd):
    line = f"{LINES[command]} {ALWAYS} --save-every 1 --max-skipped 3"
    with spoiled(command, lambda n: n >= MIDDLE[command]):
        assert tether(f"{line} --model {tiny} --out out") == 3
    assert skipped == [True] * 3
    complaint = last_line(capfd)
    assert f"tether {command}: " in complaint
    assert "the gradient is not finite (nan)" in complaint
    assert complaint.endswith(
        "; the optimizer has skipped 3 steps in a row; the run is stopped; "
        "lower the learning rate or the reward's scale; resume with 'tether resume out'"
    )
    assert assert_intact(here / "out")
    if command in ("ppo", "grpo"):  # all three in one step, which the checkpoint does not know
        assert_resumes(Path("out"), uninterrupted(line))
    else:
        assert tether("resume out") == 0


def test_a_run_that_ends_on_a_skipped_step_has_no_model(here, tiny, spoiled, skipped, capfd):
    """No later step shows that its weights are sound."""
    with spoiled("sft", lambda n: n == 16):
        assert tether(f"{LINES['sft']} {ALWAYS} --model {tiny} --out out") == 3
    assert skipped == [True]
    assert "the run ended on 1 skipped optimizer steps" in last_line(capfd)
    assert assert_intact(here / "out") == ["step_000016"]
    assert not (here / "out" / "model").exists()
    assert tether("resume out --epochs 5 --allow") == 0


def test_a_first_gradient_that_is_not_finite_stops_the_run_at_once(here, tiny, spoiled, capfd):
    with spoiled("grpo", lambda n: n == 1):
        assert tether(f"{LINES['grpo']} {ALWAYS} --model {tiny} --out out") == 3
    assert "grpo step 1: the gradient is not finite" in last_line(capfd)
    assert not (here / "out").exists()
