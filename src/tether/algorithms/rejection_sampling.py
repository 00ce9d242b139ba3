"""Rejection sampling: sample N completions a prompt, keep the best K by score, imitate them, and perhaps do it again.

One round is a step: roll out from the current policy, score, select, and fine-tune on what was selected (:mod:`sft`).
Picking the best of N moves the distribution by at most log N - (N - 1) / N nats, whatever the reward: the tether is
built in, and later rounds add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms import sft
from tether.algorithms.optimise import mean_of, require_finite
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import (
    batch_of,
    kl_metrics,
    lengths_of,
    old_logprobs,
    policy_logprobs,
    rollout_metrics,
    scores_of,
)
from tether.errors import ConfigError
from tether.models.flops import forward_flops, shape_of
from tether.models.policy import reference_of
from tether.ops.divergence import top_k_of_n_kl
from tether.seeds import derive_seed, generator
from tether.types import Completion, Demonstration, Generator, Metrics, Prompt, Sampling, Score, ScoredGroup, Scorer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of rejection sampling."""

    samples_per_prompt: int = 8
    """N: completions sampled for each prompt."""
    top_k: int = 1
    """K: completions kept a prompt."""
    keep: Literal["per_prompt", "overall"] = "per_prompt"
    """Keep the K best of each prompt, or the K * prompts best of them all."""
    select: Literal["best", "random"] = "best"
    """Keep by score, or by lot: the control that shows what imitation alone does."""
    rounds: int = 1
    """Times to sample, select and fine-tune, each from the policy that the round before left."""
    sampling: Sampling = field(default_factory=Sampling)
    sft: sft.Config = field(default_factory=sft.Config)

    def __post_init__(self) -> None:
        n, k = self.samples_per_prompt, self.top_k
        ConfigError.unless(
            {
                "top_k must be at least 1": k >= 1,
                f"samples_per_prompt (N = {n}) must be at least top_k (K = {k})": n >= k,
                "rounds must be at least 1": self.rounds >= 1,
                "temperature must be above 0: N equal samples leave no choice": self.sampling.temperature > 0,
            }
        )


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    tuning: sft.State
    """The round's fine-tuning; each round has its own optimiser, and all have one guard."""
    seed: int
    round: int = 0
    sampled: Metrics = field(default_factory=dict)
    """What the round has sampled, once its fine-tuning has begun."""
    rows: list[Metrics] = field(default_factory=list)
    """Of the round's fine-tuning steps so far."""

    @staticmethod
    def create(policy: PreTrainedModel, config: Config, *, prompts: int, seed: int) -> State:
        """A fresh state; the reference is the policy as it is now. ``prompts`` is how many each round samples from."""
        return State(
            policy=policy,
            reference=reference_of(policy),
            tuning=tuning_of(policy, config, prompts=prompts, seed=seed, number=0),
            seed=seed,
        )


def tuning_of(policy: PreTrainedModel, config: Config, *, prompts: int, seed: int, number: int) -> sft.State:
    """A fresh fine-tuning for round ``number``, over the K * ``prompts`` completions that it will select."""
    return sft.State.create(policy, config.top_k * prompts, config.sft, seed=derive_seed(seed, "sft", number))


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A kept completion with the prompt it belongs to and the score it was kept for."""

    prompt: Prompt
    completion: Completion
    score: Score

    @property
    def demonstration(self) -> Demonstration:
        return Demonstration(prompt_ids=self.prompt.ids, completion_ids=self.completion.ids)


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What one round leaves behind."""

    metrics: Metrics
    groups: tuple[ScoredGroup, ...]
    selected: tuple[Selected, ...]


def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generate: Generator,
    score: Scorer,
    config: Config,
    on_step: Callable[[Metrics], None],
) -> RoundResult:
    """One round: sample, score, select, imitate. ``on_step`` gets the metrics of each fine-tuning step.

    A round that was left half-way goes on where its fine-tuning was, if ``generate`` and ``score`` give again what they
    gave then.
    """
    where = f"rejection-sampling round {state.round + 1}"
    clock = PhaseClock(state.policy.device)
    with clock.phase("generate"):
        rollouts = generate.generate(
            prompts,
            group_size=config.samples_per_prompt,
            sampling=config.sampling,
            seed=derive_seed(state.seed, "rollout", state.round),
        )
    with clock.phase("score"):
        groups = tuple(score.score(rollouts))
    require_finite(scores_of(groups, torch.device("cpu")), what="the reward", where=where)
    selected = select(groups, config, seed=derive_seed(state.seed, "select", state.round))
    if not state.sampled:
        with clock.phase("reference"):
            state.sampled = round_metrics(state, groups, selected, config=config, where=where)
    with clock.phase("update"):
        metrics = state.sampled | imitate(
            state, [s.demonstration for s in selected], config=config.sft, on_step=on_step
        )
        state.round += 1
        guard = replace(state.tuning.guard, skipped=0)
        state.tuning = tuning_of(state.policy, config, prompts=len(prompts), seed=state.seed, number=state.round)
        state.tuning.guard = guard
        state.sampled, state.rows = {}, []
        generate.load_weights(state.round, state.policy.named_parameters())
    forward = forward_flops(shape_of(state.policy), lengths_of(groups))
    metrics |= {"flops/generate": forward, "flops/reference": forward * (1 + config.sampling.truncated)}
    metrics |= generate.figures() | clock.metrics()
    return RoundResult(metrics=metrics, groups=groups, selected=selected)


def select(groups: Sequence[ScoredGroup], config: Config, *, seed: int) -> tuple[Selected, ...]:
    """The completions to imitate: K a prompt, or K * P overall; by score, and among equal scores by lot, or all by lot.

    Rewards such as a right answer's 0 or 1 tie often: kept in the order of the data, the first prompts would take all
    the places there are overall.
    """
    candidates = [
        [
            Selected(prompt=group.rollouts.prompt, completion=completion, score=score)
            for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
        ]
        for group in groups
    ]
    pools = candidates if config.keep == "per_prompt" else [[one for pool in candidates for one in pool]]
    amount = config.top_k if config.keep == "per_prompt" else config.top_k * len(groups)
    lot = generator(seed)
    chosen: list[Selected] = []
    for pool in pools:
        drawn = [pool[i] for i in torch.randperm(len(pool), generator=lot).tolist()]
        if config.select == "best":
            drawn.sort(key=lambda one: -one.score.total)
        chosen += drawn[:amount]
    return tuple(chosen)


def round_metrics(
    state: State, groups: Sequence[ScoredGroup], selected: Sequence[Selected], *, config: Config, where: str
) -> Metrics:
    """What was sampled and what was kept.

    ``kl`` is the measured KL(pi || ref) of this round's samples; ``kl/selection_bound`` the most that selecting adds,
    for K of N a prompt and no ties; ``reward/selected`` and ``reward/gain`` what it was for.
    """
    batch = batch_of(groups, state.policy.device)

    def passes(budget: int) -> tuple[Tensor, Tensor]:
        return (
            old_logprobs(state.policy, groups, batch, sampling=config.sampling, token_budget=budget),
            policy_logprobs(state.reference, batch, temperature=config.sampling.temperature, token_budget=budget),
        )

    logp, ref_logp = state.tuning.guard.fit(passes)
    metrics = rollout_metrics(groups) | kl_metrics(logp, ref_logp, batch.mask, where=where)
    kept = sum(one.score.total for one in selected) / len(selected)
    metrics |= {"reward/selected": kept, "reward/gain": kept - metrics["reward"], "selected": float(len(selected))}
    if config.select == "best" and config.keep == "per_prompt":
        metrics["kl/selection_bound"] = top_k_of_n_kl(config.top_k, config.samples_per_prompt)
    return metrics


def imitate(
    state: State, demonstrations: Sequence[Demonstration], *, config: sft.Config, on_step: Callable[[Metrics], None]
) -> Metrics:
    """Fine-tune on the demonstrations to the end of the schedule; gives the mean of the steps' metrics as ``sft/...``,
    and the ``flops/update`` of them all.
    """
    tuning = state.tuning
    while tuning.step < tuning.total_steps:
        with tuning.cursor.undone_unless_done():
            batch = tuning.cursor.take(demonstrations, min(config.batch_size, len(demonstrations)))
            state.rows.append(sft.step(tuning, batch, config=config))
        on_step(state.rows[-1])
    taken = [row for row in state.rows if "loss" in row]
    means = {name: value for name, value in mean_of(taken).items() if not name.startswith(("time/", "flops/"))}
    return {
        **{f"sft/{name}": value for name, value in means.items()},
        "sft/skipped_updates": float(tuning.guard.skipped),
        **({"sft/final_loss": taken[-1]["loss"]} if taken else {}),
        "flops/update": sum(row["flops/update"] for row in state.rows),
    }
