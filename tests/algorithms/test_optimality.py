"""Each algorithm lands on the optimum that its loss implies, in closed form, on a space that can be enumerated."""

from __future__ import annotations

import pytest
import torch

from enumerable import tiny_llama, total_variation
from optima import BETA, GRPO_STEPS, RATE, SEED, STEPS, TOLERANCE, VOCAB, problem_and_optima, train
from tether.algorithms import grpo, ppo


@pytest.fixture(scope="module")
def problem():
    """The space, the two optima, and how far they are apart."""
    space, reference, optima = problem_and_optima()
    assert reference.exp().sum().item() == pytest.approx(1, abs=1e-5)  # every completion is in the space
    assert total_variation(optima["reverse"], optima["forward"]) > 2.5 * TOLERANCE
    assert total_variation(optima["reverse"], reference.exp()) > 2.5 * TOLERANCE
    return space, optima


def test_the_exact_gradient_reaches_the_optimum(problem):
    """The model can represent the optimum. Otherwise the tests below would say nothing about the algorithms."""
    space, optima = problem
    model = tiny_llama(VOCAB, seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(200):
        logp = space.logprobs(model)
        objective = (logp.exp() * (space.rewards - BETA * (logp - reference))).sum()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    assert total_variation(space.logprobs(model).exp().detach(), optima["reverse"]) < TOLERANCE


CASES = {
    "ppo": (ppo, {}, "reverse"),
    "grpo-k2": (grpo, {"advantage_scale": "none", "kl_estimator": "k2"}, "reverse"),
    "grpo-k3_corrected": (grpo, {"advantage_scale": "none", "kl_estimator": "k3_corrected"}, "reverse"),
    "grpo-k3": (grpo, {"advantage_scale": "none", "kl_estimator": "k3"}, "forward"),
    "grpo-group": (grpo, {"advantage_scale": "group"}, "reverse"),
    "grpo-batch": (grpo, {"advantage_scale": "batch"}, "reverse"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "options", "optimum"), CASES.values(), ids=CASES.keys())
def test_lands_on_its_optimum_and_not_on_the_other(problem, algorithm, options, optimum):
    space, optima = problem
    found = train(algorithm, space, steps=STEPS if algorithm is ppo else GRPO_STEPS, **options)
    other = {"reverse": "forward", "forward": "reverse"}[optimum]
    assert total_variation(found, optima[optimum]) < TOLERANCE
    assert total_variation(found, optima[other]) > 2 * TOLERANCE


@pytest.mark.slow
def test_the_tokenwise_kl_of_the_paper_lands_elsewhere(problem):
    """Why kl_level is 'sequence': token by token, the KL of later tokens is not charged to earlier ones."""
    space, optima = problem
    found = train(grpo, space, steps=GRPO_STEPS, advantage_scale="none", kl_estimator="k2", kl_level="token")
    assert total_variation(found, optima["reverse"]) > TOLERANCE


@pytest.mark.slow
def test_in_units_of_the_advantage_the_standard_deviation_unties_the_kl(problem):
    """The paper's form: sigma falls as the policy improves, so the KL weighs less and less, and nothing holds it."""
    space, optima = problem
    found = train(grpo, space, steps=GRPO_STEPS, advantage_scale="group", kl_units="advantage")
    assert total_variation(found, optima["reverse"]) > 0.5
