"""Rejection sampling: sample N completions per prompt, keep the best K by score, fine-tune on them, optionally repeat.

One round is a step: roll out from the current policy, score, select, and fine-tune on the selection (:mod:`sft`).
Picking the best of N moves the distribution by at most log N - (N - 1) / N nats, whatever the reward, so no KL term is
needed; R rounds are the best of N^R. A completion to which no reward applies is not selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms import sft
from tether.algorithms.optimise import mean_of
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import (
    batch_of,
    first_of,
    generator_figures,
    kl_figures,
    lengths_of,
    old_logprobs,
    reference_logprobs,
    require_rewards,
    roll_out,
    rollout_figures,
)
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import forward_flops, shape_of
from tether.models.reference import Reference, reference_of
from tether.models.trainable import trainable
from tether.ops.divergence import top_k_of_n_kl
from tether.seeds import derive_seed, generator
from tether.types import (
    Completion,
    Demonstration,
    Generator,
    Metrics,
    Prompt,
    Sampling,
    Score,
    ScoredGroup,
    Scorer,
)
from tether.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of rejection sampling."""

    group_size: int = 8
    """N: completions per prompt."""
    top_k: int = 1
    """K: completions kept per prompt."""
    keep: Literal["per_prompt", "overall"] = "per_prompt"
    """Selection per prompt (the K best of each), or overall (the K * prompts best of all)."""
    select: Literal["best", "random"] = "best"
    """Select the best by score, or random ones as a control for the effect of imitation alone."""
    rounds: int = 1
    """Rounds of sampling, selection and fine-tuning, each from the policy of the previous round."""
    sampling: Sampling = field(default_factory=Sampling)
    sft: sft.Config = field(default_factory=sft.Config)

    def __post_init__(self) -> None:
        n, k = self.group_size, self.top_k
        ConfigError.unless(
            {
                "top_k must be at least 1": k >= 1,
                f"group_size (N = {n}) must be at least top_k (K = {k})": n >= k,
                "rounds must be at least 1": self.rounds >= 1,
                "temperature must be above 0: there is no best of N equal samples": self.sampling.temperature > 0,
            }
        )


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    reference: Reference
    tuning: sft.State
    """The round's fine-tuning state. Each round has its own optimizer; all rounds share one guard. Until a round has
    selected, it is for K completions per prompt."""
    seed: int
    round: int = 0
    sampled: Metrics | None = None
    """Metrics of the round's samples, once known; None between rounds."""
    rows: list[Metrics] = field(default_factory=list)
    """Metrics of the round's fine-tuning steps so far."""
    bounded: bool = True
    """Whether K of N completions were selected for every prompt of every round so far, so that their bound holds."""

    @staticmethod
    def create(policy: PreTrainedModel, config: Config, *, prompts: int, seed: int) -> State:
        """A new state, whose reference is the current policy. ``prompts`` is the number of prompts per round."""
        return State(
            policy=policy,
            reference=reference_of(policy),
            tuning=tuning_of(policy, config, prompts=prompts, seed=seed, number=0),
            seed=seed,
        )


def tuning_of(policy: PreTrainedModel, config: Config, *, prompts: int, seed: int, number: int) -> sft.State:
    """A new fine-tuning state for round ``number``, on the K * ``prompts`` completions that it will select."""
    return tuning_on(policy, config, config.top_k * prompts, seed=seed, number=number)


def tuning_on(policy: PreTrainedModel, config: Config, completions: int, *, seed: int, number: int) -> sft.State:
    """A new fine-tuning state for round ``number``, on this many completions."""
    return sft.State.create(policy, completions, config.sft, seed=derive_seed(seed, "sft", number))


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A selected completion with its prompt, its score and its total reward."""

    prompt: Prompt
    completion: Completion
    score: Score
    total: float

    @property
    def demonstration(self) -> Demonstration:
        completion = self.completion
        return Demonstration(prompt_ids=self.prompt.ids, completion_ids=completion.ids, completion_mask=completion.mask)


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """The result of one round."""

    metrics: Metrics
    groups: tuple[ScoredGroup, ...]
    selected: tuple[Selected, ...]


def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    config: Config,
    on_step: Callable[[Metrics], None] = lambda _: None,
    world: World = ALONE,
) -> RoundResult:
    """One round: sample, score, select, fine-tune. ``on_step`` receives the metrics of each fine-tuning step.

    An interrupted round resumes within its fine-tuning if ``generator`` and ``scorer`` return what they returned
    before.
    """
    where = f"rejection-sampling round {state.round + 1}"
    clock = PhaseClock(state.policy.device)
    rolled_out = roll_out(
        prompts,
        generator=generator,
        scorer=scorer,
        group_size=config.group_size,
        sampling=config.sampling,
        seed=derive_seed(state.seed, "rollout", state.round),
        first=first_of(prompts, world),
        clock=clock,
    )
    groups = tuple(rolled_out)
    require_rewards(groups, where=where, world=world, alone=True)
    selected = select(groups, config, seed=derive_seed(state.seed, "select", state.round))
    if state.sampled is None:
        state.bounded &= not world.any(len(selected) < config.top_k * len(prompts))
        with clock.phase("reference"):
            state.sampled = round_metrics(state, groups, selected, config=config, where=where, world=world)
    if state.tuning.step == 0 and state.tuning.cursor.count != len(selected):
        guard = state.tuning.guard
        state.tuning = tuning_on(state.policy, config, len(selected), seed=state.seed, number=state.round)
        state.tuning.guard = guard
    state.tuning.total_steps = config.sft.total_steps(len(selected))
    with clock.phase("update"):
        demonstrations = [s.demonstration for s in selected]
        metrics = state.sampled | imitate(state, demonstrations, config=config.sft, on_step=on_step, world=world)
        state.round += 1
        guard = replace(state.tuning.guard, skipped=0)
        state.tuning = tuning_of(state.policy, config, prompts=len(prompts), seed=state.seed, number=state.round)
        state.tuning.guard = guard
        state.sampled, state.rows = None, []
        generator.load_weights(state.round, trainable(state.policy).items())
    forward = forward_flops(shape_of(state.policy), lengths_of(groups))
    flops: Figures = {
        "flops/generate": Sum(forward),
        "flops/reference": Sum(forward * (1 + config.sampling.truncated)),
    }
    metrics |= reduce(flops | generator_figures(generator) | clock.figures(), world)
    return RoundResult(metrics=metrics, groups=groups, selected=selected)


def select(groups: Sequence[ScoredGroup], config: Config, *, seed: int) -> tuple[Selected, ...]:
    """The completions to imitate: K per prompt, or K * P overall; by score, with ties broken at random, or all at
    random. Completions to which no reward applies, and prompts that have no other ones, do not count.

    Rewards such as 0 or 1 for a right answer tie often. If ties were broken in the order of the data, selection overall
    would favour the first prompts.
    """
    candidates = [
        [
            Selected(prompt=group.rollouts.prompt, completion=completion, score=score, total=score.total)
            for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
            if score.total is not None
        ]
        for group in groups
    ]
    pools = candidates if config.keep == "per_prompt" else [[one for pool in candidates for one in pool]]
    amount = config.top_k if config.keep == "per_prompt" else config.top_k * sum(map(bool, candidates))
    draw = generator(seed)
    chosen: list[Selected] = []
    for pool in pools:
        drawn = [pool[i] for i in torch.randperm(len(pool), generator=draw).tolist()]
        if config.select == "best":
            drawn.sort(key=lambda one: -one.total)
        chosen += drawn[:amount]
    return tuple(chosen)


def round_metrics(
    state: State,
    groups: Sequence[ScoredGroup],
    selected: Sequence[Selected],
    *,
    config: Config,
    where: str,
    world: World,
) -> Metrics:
    """Metrics of the samples and of the selection.

    ``kl`` is the measured KL(pi || ref) of this round's samples; ``kl/selection_bound`` is the most that selection
    adds, for K of N per prompt without ties, and is missing once a prompt had fewer than K completions with a reward;
    ``reward/gain`` is its gain in mean reward.
    """
    batch = batch_of(groups, state.policy.device)
    temperature = config.sampling.temperature

    def passes(budget: int) -> tuple[Tensor, Tensor]:
        return (
            old_logprobs(state.policy, groups, batch, sampling=config.sampling, token_budget=budget),
            reference_logprobs(state.reference, batch, temperature=temperature, token_budget=budget),
        )

    logp, ref_logp = state.tuning.guard.fit(passes, world)
    metrics = reduce(rollout_figures(groups) | kl_figures(logp, ref_logp, batch.mask, where=where), world)
    kept = reduce(
        {
            "reward/selected": Mean(sum(one.total for one in selected) / len(selected), len(selected)),
            "selected": Sum(float(len(selected))),
        },
        world,
    )
    metrics |= kept | {"reward/gain": kept["reward/selected"] - metrics["reward"]}
    if config.select == "best" and config.keep == "per_prompt" and state.bounded:
        metrics["kl/selection_bound"] = top_k_of_n_kl(config.top_k, config.group_size, rounds=state.round + 1)
    return metrics


def imitate(
    state: State,
    demonstrations: Sequence[Demonstration],
    *,
    config: sft.Config,
    on_step: Callable[[Metrics], None],
    world: World,
) -> Metrics:
    """Fine-tune on the demonstrations to the end of the schedule. Returns the mean of the steps' metrics as
    ``sft/...``, and their total ``flops/update``.
    """
    tuning = state.tuning
    for result in sft.steps(tuning, demonstrations, config=config, world=world):
        state.rows.append(result.metrics)
        on_step(result.metrics)
    taken = [row for row in state.rows if "loss" in row]
    means = {name: value for name, value in mean_of(taken).items() if not name.startswith(("time/", "flops/"))}
    return {
        **{f"sft/{name}": value for name, value in means.items()},
        "sft/skipped_updates": float(tuning.guard.skipped),
        **({"sft/final_loss": taken[-1]["loss"]} if taken else {}),
        "flops/update": sum(row["flops/update"] for row in state.rows),
    }
