"""tether's side of the benchmarks; every call into tether that is timed is here.

    python -m benchmarks.ours rollout|grpo_step|ppo_step|reward_epoch[:defaults] SPEC.json

Completions have equal lengths because the model and its tokenizer have no EOS: the sampler then draws from the policy's
whole distribution, as it does outside a benchmark, and its log-probs are the policy's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.worker import Spec, serve
from tether.algorithms import grpo, ppo, reward_model
from tether.algorithms.optimise import Optim
from tether.data.records import load_pairs, load_prompts
from tether.generation.engine import Engine
from tether.models.linear import round_matmuls
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.models.reward import load_reward_model
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.rewards.learned import LearnedReward
from tether.runtime.device import pick_matmul_dtype
from tether.types import Prompt, RolloutGroup, Sampling, StepResult, make_requests

Step = Callable[[], dict[str, float] | None]
MANY = 1_000_000
"""Steps of a run that does not end."""


def optim(spec: Spec) -> Optim:
    """torch's default AdamW settings, which the peers use."""
    return Optim(learning_rate=spec.learning_rate, lr_schedule="constant")


def load(spec: Spec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Prompt]]:
    model, tokenizer = load_policy(spec.model, dtype=torch.float32, device=spec.device)
    settle(spec, model)
    prompts = load_prompts(spec.prompts, tokenizer, context=MANY, max_new_tokens=spec.max_new_tokens)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    return model, tokenizer, prompts


def settle(spec: Spec, model: PreTrainedModel) -> None:
    """Apply ``--matmul-dtype`` as the commands do."""
    if pick_matmul_dtype(spec.matmul_dtype, model) == "bfloat16":
        round_matmuls(model)


def sampling(spec: Spec) -> Sampling:
    return Sampling(max_new_tokens=spec.max_new_tokens, temperature=1.0)


def check(groups: Sequence[RolloutGroup], spec: Spec) -> None:
    """Raise unless all completions exist and have the forced length."""
    lengths = [len(c.ids) for group in groups for c in group.completions]
    if lengths != [spec.max_new_tokens] * (spec.prompts_per_step * spec.group_size):
        raise RuntimeError(f"{len(lengths)} completions of {min(lengths)} to {max(lengths)} tokens")


def phases(result: StepResult, spec: Spec) -> dict[str, float]:
    """The seconds of a step's phases, after a check of its completions."""
    check([group.rollouts for group in result.groups], spec)
    return {name: value for name, value in result.metrics.items() if name.startswith("time/")}


def rollout(spec: Spec) -> Step:
    model, tokenizer, prompts = load(spec)
    engine = Engine(model, tokenizer)
    seeds = iter(range(MANY))

    def step() -> None:
        asked = make_requests(prompts, group_size=spec.group_size, seed=next(seeds))
        groups = engine.generate(asked, sampling=sampling(spec))
        check(groups, spec)

    return step


def sevens(completion_ids: list[list[int]]) -> list[float]:
    """The reward of the GRPO benchmarks: it varies and costs nothing."""
    return [sum(i % 7 == 0 for i in ids) / len(ids) for ids in completion_ids]


def grpo_step(spec: Spec) -> Step:
    model, tokenizer, prompts = load(spec)
    config = grpo.Config(
        group_size=spec.group_size,
        kl_coef=spec.kl_coef,
        micro_batch_tokens=spec.tokens_at_once,
        sampling=sampling(spec),
        optim=optim(spec),
    )
    state = grpo.State.create(
        model, config, reference=reference_of(model), prompts=len(prompts), total_steps=MANY, seed=0
    )
    engine, score = Engine(model, tokenizer), WeightedSum(((FunctionReward("sevens", sevens), 1.0),))

    def step() -> dict[str, float]:
        taken = state.cursor.take(prompts, spec.prompts_per_step)
        return phases(grpo.step(state, taken, generator=engine, scorer=score, config=config), spec)

    return step


def ppo_step(spec: Spec) -> Step:
    model, tokenizer, prompts = load(spec)
    judge, own = load_reward_model(spec.reward_model, dtype=torch.float32, device=spec.device)
    settle(spec, judge)
    learned = LearnedReward("judge", judge.requires_grad_(False), own, same_vocabulary=True)
    config = ppo.Config(
        group_size=1,
        kl_coef=spec.kl_coef,
        epochs_per_step=1,
        critic_trunk=spec.critic_trunk,
        micro_batch_tokens=spec.tokens_at_once,
        sampling=sampling(spec),
        optim=optim(spec),
    )
    state = ppo.State.create(
        model, config, reference=reference_of(model), prompts=len(prompts), total_steps=MANY, seed=0
    )
    engine, score = Engine(model, tokenizer), WeightedSum(((learned, 1.0),))

    def step() -> dict[str, float]:
        taken = state.cursor.take(prompts, spec.prompts_per_step)
        return phases(ppo.step(state, taken, generator=engine, scorer=score, config=config), spec)

    return step


def reward_epoch(spec: Spec) -> Step:
    model, tokenizer = load_reward_model(spec.reward_model, dtype=torch.float32, device=spec.device)
    settle(spec, model)
    pairs = load_pairs(spec.pairs, tokenizer, context=spec.max_length)
    config = reward_model.Config(
        epochs=MANY,
        batch_size=spec.pairs_per_step,
        centring=0.0,
        micro_batch_tokens=spec.tokens_at_once,
        optim=optim(spec),
    )
    state = reward_model.State.create(model, len(pairs), config, seed=0)

    def step() -> None:
        for _ in range(spec.steps_per_turn):
            reward_model.step(state, state.cursor.take(pairs, spec.pairs_per_step), config=config)

    return step


STEPS = {"rollout": rollout, "grpo_step": grpo_step, "ppo_step": ppo_step, "reward_epoch": reward_epoch}
DEFAULTS = {"matmul_dtype": "auto", "critic_trunk": False}
"""Defaults of the commands that a like-for-like comparison does not use."""


def synchronise_with(device: str) -> Callable[[], object]:
    """A function that waits for all work of the device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


if __name__ == "__main__":
    task, _, unasked = sys.argv[1].partition(":")
    chosen, its_spec = STEPS[task], Spec.read(sys.argv[2])
    if unasked == "defaults":
        its_spec = replace(its_spec, **DEFAULTS)
    serve(chosen(its_spec), synchronise_with(its_spec.device))
