"""Rejection sampling: sample N completions per prompt, keep the best K by score, fine-tune on them, optionally repeat.

One round is a step: roll out from the current policy, score, select, and fine-tune on the selection (:mod:`sft`).
Picking the best of N moves the distribution by at most log N - (N - 1) / N nats, whatever the reward, so no KL term is
needed; R rounds are the best of N^R. A completion to which no reward applies is not selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms import sft
from tether.algorithms.experience import Sampled, completion_figures
from tether.algorithms.optimise import OptimizerFactory, mean_of
from tether.algorithms.pending import (
    Rollouts,
    evaluated,
    publish,
    rollouts_of,
)
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import (
    first_of,
    kl_figures,
    lengths_of,
    require_rewards,
    roll_out_all,
    rollout_figures,
    sampled_of,
)
from tether.digests import prompts_digest
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import forward_flops, shape_of
from tether.models.reference import Reference, as_reference
from tether.ops.divergence import k3, top_k_of_n_kl
from tether.ops.masked import masked_sum
from tether.seeds import derive_seed, generator
from tether.stop_requests import anywhere, at_safe_points
from tether.types import (
    UNSAVED,
    Batch,
    Completion,
    CompletionFigures,
    Demonstration,
    Generator,
    Metrics,
    Prompt,
    Sampling,
    Score,
    ScoredGroup,
    Scorer,
    make_requests,
)
from tether.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of rejection sampling."""

    group_size: int = 8
    """N: completions per prompt."""
    top_k: int = 1
    """K: completions kept per prompt, of its group_size. Sampling from the k most likely tokens is top_k_tokens."""
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
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "top_k must be at least 1": k >= 1,
                "group_size must be at least top_k: K of N are kept": n >= k,
                "rounds must be at least 1": self.rounds >= 1,
                "temperature must be above 0: there is no best of N equal samples": self.sampling.temperature > 0,
            },
        )


@dataclass(kw_only=True)
class Round:
    """A round that is selected, and its fine-tuning in progress. A complete one stays until the round is over."""

    prompts: str
    """Digest of the round's prompts."""
    completions: str
    """Digest of all its completions."""
    metrics: Metrics
    """Metrics of the samples and of the selection."""
    ref_logp: Tensor  # [P * G, T]
    rollouts: Rollouts | None = field(default=None, metadata=UNSAVED)
    """What the round rolled out; None where it was restored from a checkpoint."""
    rows: list[Metrics] = field(default_factory=list)
    """Metrics of the fine-tuning steps so far."""


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    reference: Reference
    tuning: sft.State
    """The round's fine-tuning state. Each round has its own optimizer; all rounds share one guard. Until a round has
    selected, it is for K completions per prompt."""
    seed: int
    optimizer: OptimizerFactory | None = field(default=None, metadata=UNSAVED)
    """Makes each round's optimizer; None for AdamW."""
    round: int = 0
    update: Round | None = None
    """The current round, once it is selected, until it is over; None between rounds."""
    bounded: bool = True
    """Whether K of N completions were selected for every prompt of every round so far, so that their bound holds."""

    @staticmethod
    def create(
        policy: PreTrainedModel,
        config: Config,
        *,
        reference: Reference | PreTrainedModel,
        prompts: int,
        seed: int,
        optimizer: OptimizerFactory | None = None,
    ) -> State:
        """A new state. ``reference`` is what the KL is measured from: :func:`tether.models.reference.reference_of` the
        policy before it is trained, or another model. ``prompts`` is the number of prompts per round. ``optimizer``
        makes the one that replaces AdamW (:func:`tether.algorithms.optimise.optimizer_for`), for each round."""
        return State(
            policy=policy,
            reference=as_reference(reference, policy),
            tuning=tuning_of(
                policy, config, config.top_k * prompts, optimizer=optimizer, seed=derive_seed(seed, "sft", 0)
            ),
            seed=seed,
            optimizer=optimizer,
        )

    def abandon(self) -> None:
        """Drop an interrupted round, so that the next one may take other prompts. The weights stay as the fine-tuning
        steps that it had taken left them, and ``round`` counts none. A generator with weights of its own needs
        ``load_weights``."""
        self.update = None
        self.tuning.optimizer.zero_grad()

    def tune(self, config: Config, *, completions: int, number: int) -> None:
        """Begin the fine-tuning of round ``number``, on this many completions, with the guard of those before."""
        seed, guard = derive_seed(self.seed, "sft", number), replace(self.tuning.guard, skipped=0)
        self.tuning = tuning_of(self.policy, config, completions, optimizer=self.optimizer, seed=seed)
        self.tuning.guard = guard


def tuning_of(
    policy: PreTrainedModel, config: Config, completions: int, *, optimizer: OptimizerFactory | None, seed: int
) -> sft.State:
    """A new fine-tuning state, for a round that imitates this many completions."""
    return sft.State.create(policy, completions, config.sft, seed=seed, optimizer=optimizer)


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
    figures: tuple[tuple[CompletionFigures, ...], ...]
    """One per completion of ``groups``, in their order; there are no advantages."""


@at_safe_points()
def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    config: Config,
    on_step: Callable[[Metrics], None] = lambda _: None,
    world: World = ALONE,
    evaluate: Callable[[], Metrics] | None = None,
) -> RoundResult:
    """One round: sample, score, select, fine-tune, and sample once more for the KL.

    ``on_step`` receives the metrics of each fine-tuning step. ``evaluate()`` is called when ``generator`` has the new
    weights, and its metrics are those of the round too.

    A round that was interrupted resumes within its fine-tuning when it is called again with its prompts, also in a
    state restored from a checkpoint if ``generator`` and ``scorer`` return what they returned before. Other prompts are
    a :class:`ConfigError` until :meth:`State.abandon`.
    """
    where = f"rejection-sampling round {state.round + 1}"
    roll = partial(
        roll_out_all,
        prompts,
        generator=generator,
        scorer=scorer,
        policy=state.policy,
        group_size=config.group_size,
        sampling=config.sampling,
        seed=derive_seed(state.seed, "rollout", state.round),
        world=world,
    )
    rollouts = rollouts_of(state.update, prompts, roll, where=where, world=world)
    groups, clock = rollouts.groups, rollouts.clock
    require_rewards(groups, where=where, world=world, alone=True)
    selected = select(groups, config, seed=derive_seed(state.seed, "select", state.round))
    if state.update is None:
        begin(state, rollouts, prompts, selected, config=config, where=where, world=world)
    update = state.update
    assert update is not None
    state.tuning.total_steps = config.sft.total_steps(len(selected))  # no checkpoint holds it
    with clock.phase("update"):
        demonstrations = [s.demonstration for s in selected]
        metrics = update.metrics | imitate(
            state, update, demonstrations, config=config.sft, on_step=on_step, world=world
        )
    publish(generator, state.round + 1, state.policy, clock)
    metrics |= kl_after(state, prompts, generator=generator, config=config, world=world, clock=clock)
    evaluation = evaluated(evaluate, clock)
    forward = forward_flops(shape_of(state.policy), lengths_of(groups))
    flops: Figures = {
        "flops/generate": Sum(forward),
        "flops/reference": Sum(forward * (1 + config.sampling.truncated)),
    }
    metrics |= reduce(flops | rollouts.figures | clock.figures(), world) | evaluation
    rows = update.ref_logp.tolist()
    known = completion_figures(groups, rows, [None] * len(rows))
    state.update, state.round = None, state.round + 1
    state.tune(config, completions=config.top_k * len(prompts), number=state.round)
    return RoundResult(metrics=metrics, groups=groups, selected=selected, figures=known)


def begin(
    state: State,
    rollouts: Rollouts,
    prompts: Sequence[Prompt],
    selected: Sequence[Selected],
    *,
    config: Config,
    where: str,
    world: World,
) -> None:
    """Measure the samples and the selection, and begin the round's fine-tuning."""
    bounded = state.bounded and not world.any(len(selected) < config.top_k * len(prompts))
    with rollouts.clock.phase("reference"):
        batch, logp, ref_logp = logprobs_of(state, rollouts.groups, config=config, world=world)
        kl = kl_figures(logp, ref_logp, batch.mask, where=where)
        metrics = round_metrics(rollouts.groups, selected, kl, world=world)
    if config.select == "best" and config.keep == "per_prompt" and bounded:
        metrics["kl/selection_bound"] = top_k_of_n_kl(config.top_k, config.group_size, rounds=state.round + 1)
    state.tune(config, completions=len(selected), number=state.round)
    state.bounded = bounded
    state.update = Round(
        prompts=prompts_digest(prompts),
        completions=rollouts.completions,
        metrics=metrics,
        ref_logp=ref_logp,
        rollouts=rollouts,
    )


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


def logprobs_of(
    state: State, groups: Sequence[ScoredGroup], *, config: Config, world: World
) -> tuple[Batch, Tensor, Tensor]:
    """The groups' completions as a batch, and their log-probs under the policy and the reference, [B, T] each."""
    measure = partial(
        sampled_of,
        groups,
        state.policy,
        state.reference,
        recompute=config.sampling.truncated,
        temperature=config.sampling.temperature,
    )
    sampled: Sampled = state.tuning.guard.fit(lambda budget: measure(token_budget=budget), world)
    return sampled.batch, sampled.old_logp, sampled.ref_logp


def round_metrics(groups: Sequence[ScoredGroup], selected: Sequence[Selected], kl: Figures, *, world: World) -> Metrics:
    """Metrics of the samples and of the selection.

    ``kl`` is the measured KL(pi || ref) of this round's samples; ``reward/gain`` is the gain of the selection.
    """
    metrics = reduce(rollout_figures(groups) | kl, world)
    kept = reduce(
        {
            "reward/selected": Mean(sum(one.total for one in selected) / len(selected), len(selected)),
            "selected": Sum(float(len(selected))),
        },
        world,
    )
    return metrics | kept | {"reward/gain": kept["reward/selected"] - metrics["reward"]}


def kl_after(
    state: State, prompts: Sequence[Prompt], *, generator: Generator, config: Config, world: World, clock: PhaseClock
) -> Metrics:
    """``kl/after``: KL(pi || ref) of the fine-tuned policy, from one new completion per prompt.

    The mean of sum_t k3(d_t): unbiased, never negative, and of less variance than the mean of sum_t d_t. The samples of
    the round come from the policy before it, and weighting them by the ratio of the two is of no use over whole
    completions.
    """
    seed = derive_seed(state.seed, "after", state.round)
    asked = make_requests(prompts, group_size=1, seed=seed, first=first_of(prompts, world))
    with clock.phase("eval"):
        with anywhere():
            rollouts = generator.generate(asked, sampling=config.sampling)
        groups = [ScoredGroup(rollouts=one, scores=(Score(total=None),)) for one in rollouts]
        batch, logp, ref_logp = logprobs_of(state, groups, config=config, world=world)
        kl = float(masked_sum(k3(logp - ref_logp), batch.mask, dim=1).mean())
        return reduce({"kl/after": Mean(kl, len(batch))}, world)


def imitate(
    state: State,
    update: Round,
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
        update.rows.append(result.metrics)
        on_step(result.metrics)
    taken = [row for row in update.rows if "loss" in row]
    means = {name: value for name, value in mean_of(taken).items() if not name.startswith(("time/", "flops/"))}
    return {
        **{f"sft/{name}": value for name, value in means.items()},
        "sft/skipped_updates": float(tuning.guard.skipped),
        **({"sft/final_loss": taken[-1]["loss"]} if taken else {}),
        "flops/update": sum(row["flops/update"] for row in update.rows),
    }
