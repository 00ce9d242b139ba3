"""The optima with adapters of full rank, and with an environment between two turns."""

from __future__ import annotations

import pytest
import torch

from enumerable import Space, tiny_llama, total_variation
from optima import BETA, GRPO_STEPS, SEED, STEPS, TOLERANCE, VOCAB, problem_and_optima, train
from tether.algorithms import grpo, ppo
from tether.models.adapters import Lora
from two_turns import TwoTurns, trajectories

FULL_RANK = Lora(lora_rank=128)
TWO_TURN_STEPS, TWO_TURN_GROUP = 150, 64
"""Enough for trajectories of two tokens of the policy: the distance is then below 0.005."""
ADAPTED = {"ppo": (ppo, {}), "grpo": (grpo, {"advantage_scale": "group"})}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "options"), ADAPTED.values(), ids=ADAPTED.keys())
def test_an_adapter_of_full_rank_lands_where_all_weights_land(algorithm, options):
    """The reference is the policy with its adapter off, which training must not move."""
    space, _, optima = problem_and_optima()
    found = train(algorithm, space, lora=FULL_RANK, steps=STEPS if algorithm is ppo else GRPO_STEPS, **options)
    assert total_variation(found, optima["reverse"]) < TOLERANCE
    assert total_variation(found, optima["forward"]) > 2 * TOLERANCE


TWO_TURNS = {
    "ppo": (ppo, {}),
    "grpo": (grpo, {"advantage_scale": "none"}),
    "grpo-token_mean": (grpo, {"advantage_scale": "none", "loss_reduction": "token_mean"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "options"), TWO_TURNS.values(), ids=TWO_TURNS.keys())
def test_it_lands_on_the_optimum_with_the_tokens_of_an_environment_between_two_turns(algorithm, options):
    """The optimum is that of the policy's own tokens: those of the environment are context, and cost no KL."""
    space = Space.with_rewards(trajectories(VOCAB, 1), seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(tiny_llama(VOCAB, seed=SEED))
    assert reference.exp().sum().item() == pytest.approx(1, abs=1e-5)
    optimum = space.reverse_optimum(reference, BETA)
    assert total_variation(optimum, reference.exp()) > 2.5 * TOLERANCE
    found = train(
        algorithm,
        space,
        generator=TwoTurns,
        length=1,
        steps=TWO_TURN_STEPS,
        group_size=TWO_TURN_GROUP,
        **options,
    )
    assert total_variation(found, optimum) < TOLERANCE
