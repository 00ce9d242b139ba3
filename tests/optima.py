"""What the tests of optima share: the problem on a space that can be enumerated, and training with a public step."""

from __future__ import annotations

from dataclasses import replace

import torch

from enumerable import PROMPT, Space, tiny_llama
from tether.generation.engine import Engine
from tether.models.adapters import add_adapter
from tether.models.reference import reference_of
from tether.types import Prompt, Sampling
from tiny import byte_tokenizer

BETA = 0.5
TOLERANCE = 0.03
VOCAB, LENGTH, SEED = 8, 2, 1
STEPS, PROMPTS, GROUP, RATE = 300, 2, 128, 1e-3
GRPO_STEPS = 200
"""Enough for GRPO, which is then at a distance of 0.012 to 0.024; PPO has to learn its critic too."""


def problem_and_optima():
    """The space, and the optima of the two divergences."""
    space = Space.of(VOCAB, LENGTH, seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(tiny_llama(VOCAB, seed=SEED))
    optima = {"reverse": space.reverse_optimum(reference, BETA), "forward": space.forward_optimum(reference, BETA)}
    return space, reference, optima


def sampler(model):
    return Engine(model, byte_tokenizer())


def train(
    algorithm,
    space,
    *,
    generator=sampler,
    length=LENGTH,
    steps=STEPS,
    group_size=GROUP,
    rate=RATE,
    lora=None,
    **options,
):
    """Train with the public step alone; returns the trained distribution over all completions."""
    model = tiny_llama(VOCAB, seed=SEED)
    if lora:
        add_adapter(model, lora, seed=SEED)
    defaults = algorithm.Config().optim
    config = algorithm.Config(
        group_size=group_size,
        kl_coef=BETA,
        sampling=Sampling(max_new_tokens=length),
        optim=replace(defaults, learning_rate=rate),
        **options,
    )
    state = algorithm.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=steps, seed=0)
    engine = generator(model)
    prompts = [Prompt(ids=PROMPT, text="")] * PROMPTS
    for _ in range(steps):
        algorithm.step(state, prompts, generator=engine, scorer=space, config=config)
    with torch.no_grad():
        return space.logprobs(model).exp()
