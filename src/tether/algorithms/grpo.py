"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): no critic, the group is the baseline.

    A_i = (r_i - mean of the group) / (std of the group + 1e-4)
    loss = mean over completions of mean over tokens of clipped surrogate(rho_t, A_i) + kl_coef * KL estimate

Departures from the paper, each with its reason:

* The KL term estimates the divergence of *completions* (``kl_level = "sequence"``: d summed over the tokens first), so
  that the loss descends the KL that the RLHF objective names. Summed token by token, as in the paper
  (``kl_level = "token"``), the gradient leaves out how a token changes the KL of the tokens after it, and the optimum
  moves: on enumerable problems by 0.02 in total variation for k2 and more for k3.
* The sequence-level KL term has the group baseline that the reward has. It changes no expected gradient when
  completions have one length, lowers its variance, and keeps the optimum in place when the loss weighs completions
  by 1 / length.
* The default estimator is k2, whose gradient is the reverse KL's; the paper's k3 descends the forward KL instead
  (:mod:`tether.ops.divergence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.optimise import (
    Guard,
    Optim,
    Update,
    adamw,
    guarded_step,
    lr_scale,
    mean_of,
    peak_learning_rate,
    require_finite,
)
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import (
    TokenFigures,
    batch_of,
    kl_metrics,
    lengths_of,
    logprob_gap,
    old_logprobs,
    policy_logprobs,
    rollout_metrics,
    scores_of,
)
from tether.data.batching import Cursor, micro_batches
from tether.errors import ConfigError
from tether.interruption import stoppable
from tether.models.flops import forward_flops, shape_of
from tether.models.policy import completion_logprobs, reference_of
from tether.ops.advantages import batch_standardised, centred, group_standardised, leave_one_out, zero_variance
from tether.ops.divergence import KLEstimator, k2, kl_penalty, kl_slope
from tether.ops.losses import clipped_surrogate
from tether.ops.masked import masked_mean, masked_sum
from tether.ops.reduce import Reduction, reduce_loss
from tether.seeds import derive_seed
from tether.types import Batch, Generator, Metrics, Prompt, Sampling, ScoredGroup, Scorer, StepResult

LEARNING_RATE = 1e-6
"""Usual for a model of 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GRPO."""

    group_size: int = 8
    """Completions a prompt."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide centred rewards by the std of their group, of the whole step, or not at all."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Subtract the mean of the group, or of its other members (RLOO; with advantage_scale none)."""
    kl_coef: float = 0.04
    """Weight of the KL to the reference in the loss."""
    kl_estimator: KLEstimator = "k2"
    """k2 and k3_corrected descend KL(pi || ref), k3 descends KL(ref || pi), k1 does nothing."""
    kl_level: Literal["sequence", "token"] = "sequence"
    """Estimate the KL of completions, or the paper's sum over tokens of each token's own."""
    loss_reduction: Reduction = "sequence_mean"
    """Mean over each completion's tokens first (GRPO), over all tokens (DAPO), or a fixed length (Dr. GRPO)."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or one a completion: exp(mean log-ratio) (GSPO)."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - this."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + this; above clip_low it is DAPO's clip-higher."""
    epochs_per_step: int = 1
    """Passes over a step's completions."""
    minibatches: int = 1
    """Optimiser steps a pass."""
    refills: int = 0
    """Draw fresh prompts for groups whose rewards are all equal, up to this many times a step."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass; it does not change the gradient."""
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=lambda: Optim(adam_beta2=0.95))

    def __post_init__(self) -> None:
        loo = self.advantage_baseline == "leave_one_out"
        ConfigError.unless(
            {
                "group_size must be at least 2: GRPO compares a prompt's completions with each other": self.group_size
                >= 2,
                "leave_one_out goes with advantage_scale none": not loo or self.advantage_scale == "none",
                "kl_coef must be 0 or more": self.kl_coef >= 0,
                "clip_low must lie in (0, 1]": 0 < self.clip_low <= 1,
                "clip_high must be positive": self.clip_high > 0,
                "epochs_per_step must be at least 1": self.epochs_per_step >= 1,
                "minibatches must be at least 1": self.minibatches >= 1,
                "refills must be 0 or more": self.refills >= 0,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
                "temperature must be above 0: GRPO learns from sampled tokens": self.sampling.temperature > 0,
            }
        )


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    optimiser: torch.optim.Optimizer
    cursor: Cursor
    seed: int
    total_steps: int
    guard: Guard
    step: int = 0
    update: Update[Experience] | None = None
    """Of the step that has rolled out and not learned all of it yet; None between steps."""

    @staticmethod
    def create(policy: PreTrainedModel, config: Config, *, prompts: int, total_steps: int, seed: int) -> State:
        """A fresh state; the reference is the policy as it is now. ``prompts`` is how many the cursor walks over."""
        return State(
            policy=policy,
            reference=reference_of(policy),
            optimiser=adamw(
                [(policy.parameters(), peak_learning_rate(config.optim, policy, usual=LEARNING_RATE))], config.optim
            ),
            cursor=Cursor(prompts, seed),
            seed=seed,
            total_steps=total_steps,
            guard=Guard(token_budget=config.micro_batch_tokens),
        )


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What a step learns from, without gradient."""

    batch: Batch
    old_logp: Tensor  # [B, T]
    ref_logp: Tensor  # [B, T]
    advantages: Tensor  # [B]

    def rows(self, index: Tensor) -> Experience:
        batch = self.batch.rows(index)
        width = int(batch.completion_lengths.max())
        return Experience(
            batch=batch,
            old_logp=self.old_logp[index, :width],
            ref_logp=self.ref_logp[index, :width],
            advantages=self.advantages[index],
        )


def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generate: Generator,
    score: Scorer,
    config: Config,
    fresh: Callable[[int], Sequence[Prompt]] | None = None,
) -> StepResult:
    """One GRPO step: roll out, score, compare within groups, update. ``fresh(n)`` gives n new prompts for refills.

    A step that was left half-way goes on where its update was, if ``generate`` and ``score`` give again what they gave
    then.
    """
    where = f"grpo step {state.step + 1}"
    clock = PhaseClock(state.policy.device)
    groups, sampled = roll_out(state, prompts, generate=generate, score=score, config=config, fresh=fresh, clock=clock)
    if state.update is None:
        state.update = collect(state, groups, config=config, where=where, clock=clock)
    with clock.phase("update"):
        metrics = state.update.metrics | learn(state, state.update, config=config, where=where)
        state.update = None
        state.step += 1
        generate.load_weights(state.step, state.policy.named_parameters())
    metrics |= sampled | rollout_metrics(groups) | step_flops(state, groups, config) | clock.metrics()
    return StepResult(metrics=metrics, groups=groups)


def step_flops(state: State, groups: Sequence[ScoredGroup], config: Config) -> Metrics:
    """Model FLOPs of a step's phases, for the groups that it learned from (:mod:`tether.models.flops`)."""
    forward = forward_flops(shape_of(state.policy), lengths_of(groups))
    return {
        "flops/generate": forward,
        "flops/reference": forward * (1 + config.sampling.truncated),
        "flops/update": 3 * forward * config.epochs_per_step,
    }


def roll_out(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generate: Generator,
    score: Scorer,
    config: Config,
    fresh: Callable[[int], Sequence[Prompt]] | None,
    clock: PhaseClock,
) -> tuple[tuple[ScoredGroup, ...], Metrics]:
    """Scored groups of the prompts. With ``refills``, groups of zero variance give way to those of fresh prompts.

    Also gives ``sampling/groups_drawn`` and ``sampling/frac_zero_std_drawn``, over all groups that were sampled, and
    the generator's figures, of the last call.
    """
    kept: list[ScoredGroup] = []
    flat: list[ScoredGroup] = []
    wanted = list(prompts)
    for attempt in range(config.refills + 1):
        with clock.phase("generate"):
            rollouts = generate.generate(
                wanted,
                group_size=config.group_size,
                sampling=config.sampling,
                seed=derive_seed(state.seed, "rollout", state.step, attempt),
            )
        with clock.phase("score"):
            scored = score.score(rollouts)
        equal = zero_variance(scores_of(scored, torch.device("cpu"))).tolist()
        kept += [group for group, same in zip(scored, equal, strict=True) if not same]
        flat += [group for group, same in zip(scored, equal, strict=True) if same]
        missing = len(prompts) - len(kept)
        if missing == 0 or fresh is None or attempt == config.refills:
            break
        wanted = list(fresh(missing))
    drawn = len(kept) + len(flat)
    metrics = generate.figures() | {
        "sampling/groups_drawn": float(drawn),
        "sampling/frac_zero_std_drawn": len(flat) / drawn,
    }
    return tuple((kept + flat)[: len(prompts)]), metrics


def advantages_of(scores: Tensor, config: Config) -> Tensor:
    """The group-relative advantage of each completion. [P, G] -> [P, G]."""
    if config.advantage_baseline == "leave_one_out":
        return leave_one_out(scores)
    match config.advantage_scale:
        case "group":
            return group_standardised(scores)
        case "batch":
            return batch_standardised(scores)
        case "none":
            return centred(scores)


def collect(
    state: State, groups: Sequence[ScoredGroup], *, config: Config, where: str, clock: PhaseClock
) -> Update[Experience]:
    """Log-probs under the sampling policy and the reference, and an advantage for each completion: an update that has
    not begun."""
    batch = batch_of(groups, state.policy.device)

    def passes(budget: int) -> tuple[Tensor, Tensor]:
        return (
            old_logprobs(state.policy, groups, batch, sampling=config.sampling, token_budget=budget),
            policy_logprobs(state.reference, batch, temperature=config.sampling.temperature, token_budget=budget),
        )

    with clock.phase("reference"):
        old_logp, ref_logp = state.guard.fit(passes)
    with clock.phase("advantage"):
        metrics = kl_metrics(old_logp, ref_logp, batch.mask, where=where)
        scores = scores_of(groups, state.policy.device)
        require_finite(scores, what="the reward", where=where)
        advantages = advantages_of(scores, config)
        if config.kl_level == "sequence":
            advantages = advantages + config.kl_coef * kl_baseline(old_logp - ref_logp, len(groups), config)
    experience = Experience(batch=batch, old_logp=old_logp, ref_logp=ref_logp, advantages=advantages.flatten())
    return Update(experience=experience, metrics=metrics | {"advantage_std": float(advantages.std())})


def kl_baseline(log_ratio: Tensor, groups: int, config: Config) -> Tensor:
    """What the KL term's slope c(d) is on average over the group, or over its other members: [P, G].

    The KL term pulls completion i with weight -kl_coef * c(d_i); adding kl_coef times this to its advantage leaves
    -kl_coef * (c(d_i) - baseline), a weight that is zero on average, as the reward's is.
    """
    slope = kl_slope(config.kl_estimator, log_ratio.sum(1)).view(groups, -1)
    relative = leave_one_out(slope) if config.advantage_baseline == "leave_one_out" else centred(slope)
    return slope - relative


def learn(state: State, update: Update[Experience], *, config: Config, where: str) -> Metrics:
    """``epochs_per_step`` passes of ``minibatches`` optimiser steps over the experience."""
    scale = lr_scale(config.optim, state.step, state.total_steps)
    for index in update.remaining(
        len(update.experience.batch),
        epochs=config.epochs_per_step,
        parts=config.minibatches,
        seed=state.seed,
        step=state.step,
    ):
        part = update.experience.rows(index)

        def gradient(token_budget: int, part: Experience = part) -> Metrics:
            figures = backward(state, part, config=config, token_budget=token_budget, where=where)
            if update.passed == 0 and not config.sampling.truncated:
                update.gap = logprob_gap(figures["logp"], part.old_logp, figures.mask)
            low, high = figures.mean("clipped_low"), figures.mean("clipped_high")
            return {
                "loss": float(figures["loss"].sum()),
                "loss/kl": figures.mean("kl_loss"),
                "entropy": figures.mean("entropy"),
                "policy/approxkl": figures.mean("approxkl"),
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
            }

        taken = guarded_step(state.guard, state.optimiser, gradient, scale=scale, config=config.optim, where=where)
        if taken:
            update.rows.append(taken[0] | taken[1])
    return mean_of(update.rows) | update.gap | state.guard.metrics()


def backward(state: State, experience: Experience, *, config: Config, token_budget: int, where: str) -> TokenFigures:
    """Accumulate the gradient of one minibatch, micro-batch by micro-batch, over one set of denominators."""
    whole = experience.batch.mask
    tokens, sequences = int(whole.sum()), len(experience.batch)
    figures = TokenFigures(whole)
    for rows in stoppable(micro_batches(experience.batch, token_budget)):
        micro = experience.rows(rows)
        mask = micro.batch.mask
        logp, entropy = completion_logprobs(
            state.policy, micro.batch, temperature=config.sampling.temperature, entropy=True
        )
        log_ratio = logp - micro.old_logp
        if config.ratio_level == "sequence":
            log_ratio = masked_mean(log_ratio, mask, dim=1).unsqueeze(1).expand_as(logp)
        advantages = micro.advantages.unsqueeze(1).expand_as(logp)
        surrogate, clipped = clipped_surrogate(
            log_ratio, advantages, clip_low=config.clip_low, clip_high=config.clip_high
        )
        kl_loss = kl_terms(logp, micro, config)
        total = reduce_loss(
            surrogate + config.kl_coef * kl_loss,
            mask,
            reduction=config.loss_reduction,
            sequences=sequences,
            tokens=tokens,
            max_length=config.sampling.max_new_tokens,
        )
        require_finite(total, what="the loss", where=where)
        total.backward()
        figures.put(
            rows,
            logp=logp,
            loss=total.expand(len(rows), 1) / len(rows),
            kl_loss=kl_loss,
            entropy=entropy,
            approxkl=k2(logp - micro.old_logp),
            clipped_low=clipped & (advantages < 0),
            clipped_high=clipped & (advantages > 0),
        )
    return figures


def kl_terms(logp: Tensor, experience: Experience, config: Config) -> Tensor:
    """The KL term of the loss at each token, [B, T].

    At the sequence level a completion has one term, k(sum_t d_t), and each of its tokens carries an equal share of
    it, so that any reduction treats it as it treats the surrogate's sum over tokens.
    """
    mask = experience.batch.mask
    d, log_ratio = logp - experience.ref_logp, logp - experience.old_logp
    if config.kl_level == "token":
        return kl_penalty(config.kl_estimator, d, log_ratio)
    whole = kl_penalty(config.kl_estimator, masked_sum(d, mask, dim=1), masked_sum(log_ratio, mask, dim=1))
    return (whole / mask.sum(1)).unsqueeze(1).expand_as(logp)
