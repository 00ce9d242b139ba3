"""The learning rate that nobody gave."""

from __future__ import annotations

import pytest

from conftest import ARCHITECTURES
from tether.algorithms import grpo, sft
from tether.algorithms.optimise import Optim, peak_learning_rate
from tether.models.loading import load_policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_rate_is_for_width_4096_and_goes_with_its_inverse(tiny_models, architecture):
    model, _ = load_policy(tiny_models[architecture])  # 32 wide
    assert peak_learning_rate(Optim(), model, usual=1e-6) == pytest.approx(1.28e-4)
    assert peak_learning_rate(Optim(learning_rate=3e-5), model, usual=1e-6) == 3e-5


def test_each_algorithm_starts_from_its_own_usual_rate(tiny):
    model, _ = load_policy(tiny)
    by_grpo = grpo.State.create(model, grpo.Config(), prompts=4, total_steps=1, seed=0).optimiser
    by_sft = sft.State.create(model, 4, sft.Config(), seed=0).optimiser
    assert by_grpo.param_groups[0]["peak_lr"] == pytest.approx(1e-6 * 128)
    assert by_sft.param_groups[0]["peak_lr"] == pytest.approx(2e-5 * 128)
