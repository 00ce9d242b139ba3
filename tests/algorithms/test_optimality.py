"""Each algorithm lands on the optimum that its loss implies, in closed form, on a space that can be enumerated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from enumerable import PROMPT, Space, tiny_llama, total_variation
from tether.algorithms import grpo, ppo
from tether.generation.engine import Engine
from tether.models.adapters import Lora, add_adapter
from tether.models.reference import reference_of
from tether.types import Prompt, Sampling
from tiny import byte_tokenizer
from two_turns import TwoTurns, trajectories

BETA = 0.5
TOLERANCE = 0.03
VOCAB, LENGTH, SEED = 8, 2, 1
STEPS, PROMPTS, GROUP, RATE = 300, 2, 128, 1e-3
FULL_RANK = Lora(lora_rank=128)
TWO_TURN_STEPS, TWO_TURN_GROUP = 150, 64
"""Enough for trajectories of two tokens of the policy: the distance is then below 0.005."""


@pytest.fixture(scope="module")
def problem():
    """The space, the two optima, and how far they are apart."""
    space = Space.of(VOCAB, LENGTH, seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(tiny_llama(VOCAB, seed=SEED))
    optima = {"reverse": space.reverse_optimum(reference, BETA), "forward": space.forward_optimum(reference, BETA)}
    assert reference.exp().sum().item() == pytest.approx(1, abs=1e-5)  # every completion is in the space
    assert total_variation(optima["reverse"], optima["forward"]) > 2.5 * TOLERANCE
    assert total_variation(optima["reverse"], reference.exp()) > 2.5 * TOLERANCE
    return space, optima


def sampler(model):
    return Engine(model, byte_tokenizer())


def train(algorithm, space, *, generator=sampler, length=LENGTH, steps=STEPS, group_size=GROUP, lora=None, **options):
    """Train with the public step alone; returns the trained distribution over all completions."""
    model = tiny_llama(VOCAB, seed=SEED)
    if lora:
        add_adapter(model, lora, seed=SEED)
    defaults = algorithm.Config().optim
    config = algorithm.Config(
        group_size=group_size,
        kl_coef=BETA,
        sampling=Sampling(max_new_tokens=length),
        optim=replace(defaults, learning_rate=RATE),
        **options,
    )
    state = algorithm.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=steps, seed=0)
    engine = generator(model)
    prompts = [Prompt(ids=PROMPT, text="")] * PROMPTS
    for _ in range(steps):
        algorithm.step(state, prompts, generator=engine, scorer=space, config=config)
    with torch.no_grad():
        return space.logprobs(model).exp()


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
    found = train(algorithm, space, **options)
    other = {"reverse": "forward", "forward": "reverse"}[optimum]
    assert total_variation(found, optima[optimum]) < TOLERANCE
    assert total_variation(found, optima[other]) > 2 * TOLERANCE


ADAPTED = {"ppo": (ppo, {}), "grpo": (grpo, {"advantage_scale": "group"})}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "options"), ADAPTED.values(), ids=ADAPTED.keys())
def test_an_adapter_of_full_rank_lands_where_all_weights_land(problem, algorithm, options):
    """The reference is the policy with its adapter off, which training must not move."""
    space, optima = problem
    found = train(algorithm, space, lora=FULL_RANK, **options)
    assert total_variation(found, optima["reverse"]) < TOLERANCE
    assert total_variation(found, optima["forward"]) > 2 * TOLERANCE


@pytest.mark.slow
def test_the_tokenwise_kl_of_the_paper_lands_elsewhere(problem):
    """Why kl_level is 'sequence': token by token, the KL of later tokens is not charged to earlier ones."""
    space, optima = problem
    found = train(grpo, space, advantage_scale="none", kl_estimator="k2", kl_level="token")
    assert total_variation(found, optima["reverse"]) > TOLERANCE


@pytest.mark.slow
def test_in_units_of_the_advantage_the_standard_deviation_unties_the_kl(problem):
    """The paper's form: sigma falls as the policy improves, so the KL weighs less and less, and nothing holds it."""
    space, optima = problem
    found = train(grpo, space, advantage_scale="group", kl_units="advantage")
    assert total_variation(found, optima["reverse"]) > 0.5


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
