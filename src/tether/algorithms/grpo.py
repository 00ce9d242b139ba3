"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): no critic, the group is the baseline.

    A_i = (r_i - mean of the group) / (std of the group + 1e-4)
    loss = mean over completions of mean over tokens of surrogate(rho_t, A_i) + kl_coef * KL estimate

Departures from the paper, each with its reason:

* The KL term estimates the divergence of *completions* (``kl_level = "sequence"``: d summed over the tokens first), so
  that the loss descends the KL of the RLHF objective. Summed token by token, as in the paper (``kl_level = "token"``),
  the gradient omits the effect of a token on the KL of later tokens, and the optimum moves: on enumerable problems by
  0.02 in total variation for k2 and more for k3.
* The sequence-level KL term has the same group baseline as the reward. It does not change the expected gradient when
  all completions have one length, lowers its variance, and keeps the optimum unchanged when the loss weights
  completions by 1 / length.
* The KL is divided by the standard deviation that divides the rewards (``kl_units = "reward"``). Left whole, as in the
  paper (``"advantage"``), it is untied from the reward: the policy then goes to pi_ref exp(r / (kl_coef sigma)) / Z,
  with sigma the spread of its own rewards, which falls as it improves.
* The default estimator is k2, whose gradient is the reverse KL's; the paper's k3 descends the forward KL instead
  (:mod:`tether.ops.divergence`).

A completion to which no reward applies leaves the mean and the std of its group, and the KL term alone applies to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.dynamic_sampling import roll_out_groups
from tether.algorithms.experience import GroupExperience, group_figures
from tether.algorithms.optimise import Guard, Optim, OptimizerFactory, optimizer_for, peak_learning_rate
from tether.algorithms.own_loss import Loss, own_terms
from tether.algorithms.pending import Rollouts, evaluated, publish, rollouts_of
from tether.algorithms.policy_update import Plan, Update, learn
from tether.algorithms.rollouts import (
    CUTS_SUPPORT,
    applies_of,
    kl_figures,
    lengths_of,
    require_rewards,
    rollout_figures,
    sampled_of,
    scores_of,
)
from tether.algorithms.surrogate import OldLogp, Surrogate, inputs_of, old_logp_from, surrogate_of
from tether.data.batching import Cursor
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import forward_flops, shape_of, training_factor
from tether.models.policy import completion_logprobs
from tether.models.reference import Reference, as_reference
from tether.ops.advantages import Baseline, Scale, max_of_k, relative, standardised
from tether.ops.divergence import KLEstimator, kl_slope
from tether.ops.losses import LossInputs, LossTerms, grpo_loss, grpo_terms
from tether.ops.reduce import Reduction
from tether.ops.surrogates import Level, adapt_entropy_coef, entropy_price
from tether.seeds import derive_seed
from tether.stop_requests import at_safe_points
from tether.types import Generator, Metrics, Prompt, Sampling, ScoredGroup, Scorer, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 1e-6
"""The usual rate for a model with 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GRPO."""

    group_size: int = 8
    """Completions per prompt, whose rewards are compared with each other."""
    advantage_scale: Scale = "group"
    """Scale of the advantages: divide by the std of the group, of the whole batch, or not at all."""
    advantage_baseline: Baseline = "mean"
    """Baseline: the mean of the group, or leave_one_out, of the others (RLOO; requires advantage_scale none), or of the
    whole batch (REINFORCE++; group_size may then be 1)."""
    pass_at_k: int = 1
    """Pass@k training: reward each completion by what it adds to the best of this many draws; 1 rewards it alone."""
    positive_only: bool = False
    """Learn from positive advantages only: negative ones count as 0."""
    kl_coef: float = 0.04
    """Weight of the KL to the reference in the loss."""
    kl_units: Literal["reward", "advantage"] = "reward"
    """Units of kl_coef: reward divides the KL by the std that divides the rewards, so that the optimum stays
    pi_ref exp(r / kl_coef) / Z; advantage does not, as in the paper: the KL then weighs less as the std falls."""
    kl_estimator: KLEstimator = "k2"
    """KL estimator: k2 and k3_corrected descend KL(pi || ref), k3 descends KL(ref || pi), k1 has no effect."""
    kl_level: Level = "sequence"
    """Level of the KL estimate: the whole sequence, or each token, as in the paper."""
    loss_reduction: Reduction = "sequence_mean"
    """Loss reduction: mean over the tokens of each completion first (sequence_mean, GRPO), over all tokens (token_mean,
    DAPO), or divided by the maximum length (fixed_length, Dr. GRPO)."""
    ratio_level: Level = "token"
    """Importance ratio per token, or per sequence: exp(mean log-ratio) (GSPO)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; with entropy_target, its initial value."""
    entropy_target: float | None = None
    """Target of the adaptive entropy bonus, in nats per token: entropy_coef rises while the entropy is at most this,
    falls while it is above, and applies below only (Skywork-OR1). By default entropy_coef is constant."""
    entropy_step: float = 0.005
    """What the adaptive entropy_coef rises or falls by per step."""
    epochs_per_step: int = 1
    """Times that a step goes through its completions: it takes epochs_per_step * minibatches optimizer steps."""
    minibatches: int = 1
    """Parts that an epoch splits a step's completions into, with an optimizer step for each."""
    dynamic_sampling: int = 0
    """Dynamic sampling (DAPO): times per step that groups of zero variance may be replaced by groups of new prompts; 0
    is off."""
    allow_truncated_sampling: bool = False
    """Allow top_p, top_k_tokens and min_p, under which the policy collapses: tokens outside of the kept set lose their
    probability and never come back."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
    surrogate: Surrogate = field(default_factory=Surrogate)
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=lambda: Optim(adam_beta2=0.95))

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        alone, scale = self.advantage_baseline == "batch", self.advantage_scale
        compares = "GRPO compares a prompt's completions with each other"
        ConfigError.unless(
            self,
            {
                f"group_size must be at least 2: {compares}": self.group_size >= 2 or (alone and self.group_size == 1),
                "leave_one_out requires advantage_scale none": self.advantage_baseline != "leave_one_out"
                or scale == "none",
                "advantage_baseline batch requires advantage_scale batch or none": not alone or scale != "group",
                "pass_at_k must lie in 1..group_size - 1": 1 <= self.pass_at_k < max(2, self.group_size),
                "kl_coef must be 0 or more": self.kl_coef >= 0,
                "entropy_coef must be 0 or more": self.entropy_coef >= 0,
                "entropy_target must be positive": self.entropy_target is None or self.entropy_target > 0,
                "entropy_step must be positive": self.entropy_step > 0,
                "epochs_per_step must be at least 1": self.epochs_per_step >= 1,
                "minibatches must be at least 1": self.minibatches >= 1,
                "dynamic_sampling must be 0 or more": self.dynamic_sampling >= 0,
                "dynamic_sampling needs a group_size of at least 2": not self.dynamic_sampling or self.group_size >= 2,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
                "temperature must be above 0: GRPO learns from sampled tokens": self.sampling.temperature > 0,
                CUTS_SUPPORT: self.allow_truncated_sampling or not self.sampling.cuts_support,
            },
        )

    @property
    def old_logp(self) -> OldLogp:
        """Where old log-probs come from."""
        return old_logp_from(self.surrogate, self.sampling, from_update=self.epochs_per_step * self.minibatches == 1)


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    reference: Reference
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    entropy_coef: float
    seed: int
    total_steps: int
    guard: Guard
    step: int = 0
    entropy: float | None = None
    """Entropy of the last update, nats per token; None before the first."""
    update: Update[GroupExperience] | None = None
    """The current step's update, once its experience is collected, until the step is over; None between steps."""

    @staticmethod
    def create(
        policy: PreTrainedModel,
        config: Config,
        *,
        reference: Reference | PreTrainedModel,
        prompts: int,
        total_steps: int,
        seed: int,
        optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
    ) -> State:
        """A new state. ``reference`` is what the KL is measured from: :func:`tether.models.reference.reference_of` the
        policy before it is trained, or another model. ``prompts`` is the number of prompts of the data set, and
        ``optimizer`` replaces AdamW (:func:`tether.algorithms.optimise.optimizer_for`)."""
        rate = peak_learning_rate(config.optim, policy, usual=LEARNING_RATE)
        return State(
            policy=policy,
            reference=as_reference(reference, policy),
            optimizer=optimizer_for([(policy.parameters(), rate)], config.optim, optimizer),
            cursor=Cursor(prompts, seed),
            entropy_coef=config.entropy_coef,
            seed=seed,
            total_steps=total_steps,
            guard=Guard(token_budget=config.micro_batch_tokens),
        )

    def abandon(self) -> None:
        """Drop the update of an interrupted step, so that the next one may take other prompts. Weights and optimizer
        stay as the optimizer steps that it had taken left them, and ``step`` counts none. A generator with weights of
        its own needs ``load_weights``."""
        self.update = None
        self.optimizer.zero_grad()


@at_safe_points()
def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    config: Config,
    world: World = ALONE,
    fresh: Callable[[int], Sequence[Prompt]] | None = None,
    loss: Loss | None = None,
    evaluate: Callable[[], Metrics] | None = None,
) -> StepResult:
    """One GRPO step: roll out, score, compare within groups, update.

    ``fresh(n)`` returns n new prompts, for dynamic sampling. ``loss`` takes the place of the surrogate
    (:func:`objective`). ``evaluate()`` is called when ``generator`` has the new weights, and its metrics are those of
    the step too.

    A step that was interrupted resumes within its update when it is called again with its prompts, also in a state
    restored from a checkpoint if ``generator`` and ``scorer`` return what they returned before. Other prompts are a
    :class:`ConfigError` until :meth:`State.abandon`.
    """
    where = f"grpo step {state.step + 1}"
    roll = partial(
        roll_out_groups,
        prompts,
        generator=generator,
        scorer=scorer,
        policy=state.policy,
        group_size=config.group_size,
        sampling=config.sampling,
        seed=partial(derive_seed, state.seed, "rollout", state.step),
        replacements=config.dynamic_sampling,
        fresh=fresh,
        world=world,
    )
    in_memory = state.update is not None and state.update.rollouts is not None
    rollouts = rollouts_of(state.update, prompts, roll, where=where, world=world)
    if in_memory and fresh is not None:
        for missing in rollouts.drawn:
            fresh(missing)
    groups, clock = rollouts.groups, rollouts.clock
    update = state.update or collect(state, rollouts, prompts, config=config, where=where, world=world)
    state.update = update
    price = entropy_price(state.entropy_coef, state.entropy, target=config.entropy_target)
    with clock.phase("update"):
        of_rows = partial(objective, state.policy, config=config, loss=loss, entropy_coef=price)
        learned = learn(state, update, of_rows, plan_of(config), where=where, world=world)
    publish(generator, state.step + 1, state.policy, clock)
    evaluation = evaluated(evaluate, clock)
    figures = rollouts.figures | rollout_figures(groups) | clock.figures() | step_flops(state, groups, config)
    metrics = update.metrics | learned.metrics | {"entropy_coef": price} | reduce(figures, world) | evaluation
    result = StepResult(metrics=metrics, groups=groups, figures=group_figures(groups, update.experience))
    state.entropy = learned.metrics.get("entropy", state.entropy)
    if config.entropy_target is not None and state.entropy is not None:
        target, by = config.entropy_target, config.entropy_step
        state.entropy_coef = adapt_entropy_coef(state.entropy_coef, state.entropy, target=target, step=by)
    state.update, state.step = None, state.step + 1
    return result


def objective(
    policy: PreTrainedModel,
    part: GroupExperience,
    config: Config,
    loss: Loss | None = None,
    entropy_coef: float = 0.0,
) -> tuple[LossInputs, LossTerms]:
    """The loss inputs of the rows in ``part``, and the loss of each of their tokens: the surrogate, or what ``loss``
    makes of the inputs, plus the KL term and the entropy bonus."""
    logp, entropy = completion_logprobs(
        policy, part.sampled.batch, temperature=config.sampling.temperature, entropy=True
    )
    inputs = inputs_of(part.sampled, logp, entropy, part.advantages.unsqueeze(1).expand_as(logp), old=config.old_logp)
    if loss is not None:
        terms = own_terms(loss, inputs)
    else:
        terms = grpo_terms(surrogate_of(inputs, config.surrogate, ratio_level=config.ratio_level), inputs.advantages)
    return inputs, grpo_loss(
        terms,
        inputs,
        kl_weight=part.kl_weight.unsqueeze(1),
        kl_estimator=config.kl_estimator,
        kl_level=config.kl_level,
        entropy_coef=entropy_coef,
    )


def plan_of(config: Config) -> Plan:
    """The plan of a step's update."""
    return Plan(
        epochs=config.epochs_per_step,
        minibatches=config.minibatches,
        reduction=config.loss_reduction,
        max_length=config.sampling.max_new_tokens,
        optim=config.optim,
        measure_gap=not config.sampling.truncated,
    )


def step_flops(state: State, groups: Sequence[ScoredGroup], config: Config) -> Figures:
    """Model FLOPs of a step's phases, for the groups it trained on (:mod:`tether.models.flops`)."""
    forward = forward_flops(shape_of(state.policy), lengths_of(groups))
    return {
        "flops/generate": Sum(forward),
        "flops/reference": Sum(forward * (1 + (config.old_logp == "pass"))),
        "flops/update": Sum(training_factor(state.policy) * forward * config.epochs_per_step),
    }


def collect(
    state: State, rollouts: Rollouts, prompts: Sequence[Prompt], *, config: Config, where: str, world: World
) -> Update[GroupExperience]:
    """An update that has not begun: log-probs under the sampling policy and the reference, and an advantage per
    completion."""
    groups, clock = rollouts.groups, rollouts.clock
    require_rewards(groups, where=where, world=world)
    measure = partial(
        sampled_of,
        groups,
        state.policy,
        state.reference,
        recompute=config.old_logp == "pass",
        temperature=config.sampling.temperature,
        mask_truncated=config.surrogate.mask_truncated,
    )
    with clock.phase("reference"):
        sampled = state.guard.fit(lambda budget: measure(token_budget=budget), world)
    with clock.phase("advantage"):
        metrics = reduce(kl_figures(sampled.old_logp, sampled.ref_logp, sampled.batch.mask, where=where), world)
        log_ratio = sampled.old_logp - sampled.ref_logp
        scores, applies = scores_of(groups, state.policy.device), applies_of(groups, state.policy.device)
        advantages, weight, spread = advantages_of(scores, log_ratio, config, world, applies)
        price = {"kl_coef/effective": Mean(float((weight * spread).mean()), len(groups))}
        metrics |= reduce(price, world) | {"advantage_std": float(torch.cat(world.gather(advantages)).std())}
    experience = GroupExperience(
        sampled=sampled,
        advantages=advantages.flatten(),
        kl_weight=weight.repeat_interleave(config.group_size),
    )
    return Update.begun(experience, rollouts, prompts, metrics)


def advantages_of(
    scores: Tensor, log_ratio: Tensor, config: Config, world: World, applies: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The advantages of completions [P, G], the weight of each group's KL term [P], and what divided the rewards of
    each [P]. ``log_ratio`` is logp - ref_logp [P * G, T], 0 where the policy did not emit the token.

    The gradient of the sequence-level KL term has the weight -kl_coef * c(d_i) for completion i. Its baseline, the mean
    of c(d) over what the rewards are compared with, makes that -kl_coef * (c(d_i) - baseline): zero on average, as the
    reward's.
    """
    baseline, scale = config.advantage_baseline, config.advantage_scale
    rewards = scores if config.pass_at_k == 1 else max_of_k(scores, config.pass_at_k, applies)
    values, spread = standardised(rewards, applies, baseline=baseline, scale=scale, gather=world.gather)
    if config.positive_only:
        values = values.clamp(min=0.0)
    weight = config.kl_coef / spread if config.kl_units == "reward" else torch.full_like(spread, config.kl_coef)
    if config.kl_level == "sequence":
        slope = kl_slope(config.kl_estimator, log_ratio.sum(1)).view(scores.shape)
        values = values + weight.unsqueeze(1) * (slope - relative(slope, baseline, gather=world.gather))
    return values, weight, spread
