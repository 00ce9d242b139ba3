"""What a run holds and computes, as far as its memory and its time depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tether.config import PromptOptions, RunOptions
from tether.models.dry_run import Form
from tether.types import Budget, Sampling

Row = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of its completions or sides."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The models and the data of a run."""

    policy: Form
    """The model that is trained, before it gets the adapter that the options ask for."""
    rows: Sequence[Row]
    """What it is trained on; of prompts only the number of their tokens counts."""
    held_out: Sequence[Row] = ()
    """The prompts of its evaluation."""
    reward_models: Sequence[Form] = ()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a step samples and scores, and what an evaluation does."""

    groups: Sequence[Row]
    evaluated: Sequence[Row]
    sampling: Sampling
    budget: Budget
    reward_models: Sequence[Form]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The step of a run with the longest rows of its data, and completions at the limit of their length."""

    policy: Form
    run: RunOptions
    kind: Literal["language model", "reward model"] = "language model"
    rows: Sequence[Row]
    """Of one optimizer step."""
    paired: bool = False
    """Whether both sides of a row are always in one pass."""
    micro_batch_tokens: int
    updates: float
    """Optimizer steps of a step."""
    entropy: bool = False
    """Whether the update needs the entropy of each token."""
    critic: Literal["none", "head", "trunk"] = "none"
    reference: bool = False
    """Whether the reference is held beside the policy."""
    best_weights: bool = False
    """Whether the weights of the best evaluation are held too."""
    sampled: Sampled | None = None


def longest(rows: Sequence[Row], count: int) -> list[Row]:
    """The ``count`` rows with the most tokens, or all of them."""
    return sorted(rows, key=lambda row: -(row[0] + sum(row[1])))[:count]


def answered(prompts: Sequence[Row], group_size: int, sampling: Sampling) -> list[Row]:
    """Prompts with completions of the longest allowed length."""
    return [(prompt, [sampling.max_new_tokens] * group_size) for prompt, _ in prompts]


def sampled_by(command: Any, extent: Extent, config: Any, per_step: int) -> Sampled:
    """What a policy-training command samples with ``per_step`` prompts in a step."""
    task: PromptOptions = command.task
    return Sampled(
        groups=answered(longest(extent.rows, per_step), config.group_size, config.sampling),
        evaluated=answered(extent.held_out, task.evaluation.eval_group_size, config.sampling),
        sampling=config.sampling,
        budget=task.budget,
        reward_models=extent.reward_models,
    )


def of_sft(command: Any, extent: Extent) -> Workload:
    return Workload(
        policy=extent.policy,
        run=command.run,
        rows=longest(extent.rows, command.sft.batch_size),
        micro_batch_tokens=command.sft.micro_batch_tokens,
        updates=1,
    )


def of_reward(command: Any, extent: Extent) -> Workload:
    return Workload(
        policy=extent.policy,
        run=command.run,
        kind="reward model",
        rows=longest(extent.rows, command.reward.batch_size),
        paired=True,
        micro_batch_tokens=command.reward.micro_batch_tokens,
        updates=1,
        best_weights=True,
    )


def of_dpo(command: Any, extent: Extent) -> Workload:
    compared = command.evaluation.eval_prompts is not None
    sampled = Sampled(
        groups=[],
        evaluated=answered(extent.held_out, command.evaluation.eval_group_size, command.sampling),
        sampling=command.sampling,
        budget=command.budget,
        reward_models=extent.reward_models,
    )
    return Workload(
        policy=extent.policy,
        run=command.run,
        rows=longest(extent.rows, command.dpo.batch_size),
        paired=True,
        micro_batch_tokens=command.dpo.micro_batch_tokens,
        updates=1,
        reference=compared,
        sampled=sampled if compared else None,
    )


def of_rejection_sampling(command: Any, extent: Extent) -> Workload:
    config = command.rejection_sampling
    sampled = sampled_by(command, extent, config, per_step=len(extent.rows))
    selected = [(prompt, completions[:1]) for prompt, completions in sampled.groups for _ in range(config.top_k)]
    return Workload(
        policy=extent.policy,
        run=command.run,
        rows=selected[: config.sft.batch_size],
        micro_batch_tokens=config.sft.micro_batch_tokens,
        updates=config.sft.epochs * len(selected) / config.sft.batch_size,
        reference=True,
        sampled=sampled,
    )


def of_policy(command: Any, extent: Extent, config: Any, **more: Any) -> Workload:
    """PPO and GRPO: a minibatch has its share of each group, as a random one has on average."""
    sampled = sampled_by(command, extent, config, per_step=command.length.prompts_per_step)
    numbered, part = 0, []
    for prompt, completions in sampled.groups:
        own = [length for k, length in enumerate(completions, numbered) if k % config.minibatches == 0]
        numbered += len(completions)
        part += [(prompt, own)] if own else []
    return Workload(
        policy=extent.policy,
        run=command.run,
        rows=part,
        micro_batch_tokens=config.micro_batch_tokens,
        updates=config.epochs_per_step * config.minibatches,
        entropy=True,
        reference=True,
        sampled=sampled,
        **more,
    )


def of_ppo(command: Any, extent: Extent) -> Workload:
    critic = "trunk" if command.ppo.critic_trunk else "head"
    return of_policy(command, extent, command.ppo, critic=critic)


def of_grpo(command: Any, extent: Extent) -> Workload:
    return of_policy(command, extent, command.grpo)


WORKLOADS: Mapping[str, Callable[[Any, Extent], Workload]] = {
    "sft": of_sft,
    "reward": of_reward,
    "dpo": of_dpo,
    "rejection-sampling": of_rejection_sampling,
    "ppo": of_ppo,
    "grpo": of_grpo,
}
"""By the name of a training command: from its options and its models and data."""
