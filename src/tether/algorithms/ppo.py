"""Proximal policy optimisation on tokens (Schulman et al. 2017, arXiv 1707.06347; for text, Ziegler et al. 2019).

    r_t = -kl_coef * (logp_t - ref_logp_t), plus the score at the last emitted token or the scorer's reward of each
    A_t, R_t = GAE(r, V; gamma, lam)
    loss = mean_t surrogate + value_coef * mean_t clipped value loss - entropy_coef * mean_t entropy

Departures from the textbook: a state is a prompt and the tokens so far and an action is a token, so a trajectory is a
completion and rollouts never truncate one; the step's denominators are counted before it is split; the gradients of
policy and critic are clipped separately, so that a large value loss does not shrink the policy's step. The update does
not see a completion to which no reward applies: it has no return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.experience import Sampled, TokenExperience, token_figures
from tether.algorithms.optimise import (
    Guard,
    Optim,
    OptimizerFactory,
    optimizer_for,
    peak_learning_rate,
    require_finite,
)
from tether.algorithms.pending import Rollouts, evaluated, publish, rollouts_of
from tether.algorithms.policy_update import Plan, Update, learn
from tether.algorithms.rollouts import (
    CUTS_SUPPORT,
    applies_of,
    kl_figures,
    lengths_of,
    per_token,
    require_rewards,
    roll_out_all,
    rollout_figures,
    sampled_of,
    scored,
)
from tether.algorithms.surrogate import OldLogp, Surrogate, inputs_of, old_logp_from, surrogate_of
from tether.data.batching import Cursor
from tether.errors import ConfigError
from tether.figures import Figures, Sum, reduce
from tether.models.flops import forward_flops, shape_of, training_factor
from tether.models.policy import Critic, completion_states, logprobs_of_states
from tether.models.reference import Reference, as_reference
from tether.ops.divergence import adapt_kl_coef, k1
from tether.ops.losses import LossInputs, LossTerms, ValueInputs, ppo_loss
from tether.ops.masked import masked_mean, masked_var, rescale, whiten
from tether.ops.returns import gae, turn_discounts
from tether.seeds import derive_seed
from tether.stop_requests import at_safe_points
from tether.types import Batch, FinishReason, Generator, Metrics, Prompt, Sampling, ScoredGroup, Scorer, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 1e-6
"""The usual rate for a model with 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PPO."""

    group_size: int = 1
    """Completions per prompt."""
    kl_coef: float = 0.05
    """Weight of the KL penalty in each token's reward; with adaptive_kl_target, its initial value."""
    adaptive_kl_target: float | None = None
    """Target of the adaptive KL controller, in nats per completion: kl_coef is adapted towards it. By default kl_coef
    is constant."""
    adaptive_kl_horizon: int = 10_000
    """Horizon of the adaptive KL controller, in completions."""
    gamma: float = 1.0
    """Discount factor."""
    discount: Literal["token", "turn"] = "token"
    """What gamma counts: every token, or with an environment only the turns, within which nothing is discounted."""
    lam: float = 0.95
    """GAE lambda: from bias (0) to variance (1)."""
    epochs_per_step: int = 2
    """Times that a step goes through its completions: it takes epochs_per_step * minibatches optimizer steps."""
    minibatches: int = 1
    """Parts that an epoch splits a step's completions into, with an optimizer step for each."""
    value_clip: float = 0.2
    """Value clipping: the old value +- this."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
    """Early stopping: end a step's update once the policy is this far from its rollouts, in nats per token. By default
    all epochs run."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the step, without a shift."""
    whiten_advantages: bool = True
    """Centre and scale advantages over the step."""
    missing_eos_penalty: float = 0.0
    """Penalty on the score of a completion that was cut at the length limit."""
    critic_trunk: bool = False
    """Give the critic a trunk of its own, copied from the policy. By default its head reads the policy's hidden states,
    which halves the arithmetic of an update and the optimizer's memory."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic. By default the policy's."""
    allow_truncated_sampling: bool = False
    """Allow top_p, top_k_tokens and min_p, under which the policy collapses: tokens outside of the kept set lose their
    probability and never come back."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
    surrogate: Surrogate = field(default_factory=Surrogate)
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=lambda: Optim(adam_beta2=0.95, adam_eps=1e-5))

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "group_size must be at least 1": self.group_size >= 1,
                "kl_coef must be 0 or more": self.kl_coef >= 0,
                "adaptive_kl_target must be positive": self.adaptive_kl_target is None or self.adaptive_kl_target > 0,
                "adaptive_kl_target needs an initial kl_coef above 0": self.adaptive_kl_target is None
                or self.kl_coef > 0,
                "adaptive_kl_horizon must be positive": self.adaptive_kl_horizon > 0,
                "gamma must lie in [0, 1]": 0 <= self.gamma <= 1,
                "lam must lie in [0, 1]": 0 <= self.lam <= 1,
                "epochs_per_step must be at least 1": self.epochs_per_step >= 1,
                "minibatches must be at least 1": self.minibatches >= 1,
                "value_clip must be positive": self.value_clip > 0,
                "value_coef must be positive": self.value_coef > 0,
                "target_kl must be positive": self.target_kl is None or self.target_kl > 0,
                "critic_learning_rate must be positive": self.critic_learning_rate is None
                or self.critic_learning_rate > 0,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
                "temperature must be above 0: PPO learns from sampled tokens": self.sampling.temperature > 0,
                CUTS_SUPPORT: self.allow_truncated_sampling or not self.sampling.cuts_support,
            },
        )

    @property
    def old_logp(self) -> OldLogp:
        """Where old log-probs come from; the rewards hold their KL, so they are known before the update."""
        return old_logp_from(self.surrogate, self.sampling, from_update=False)


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    reference: Reference
    critic: Critic
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    kl_coef: float
    seed: int
    total_steps: int
    guard: Guard
    step: int = 0
    update: Update[TokenExperience] | None = None
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
        optimizer: OptimizerFactory | None = None,
    ) -> State:
        """A new state. ``reference`` is what the KL is measured from: :func:`tether.models.reference.reference_of` the
        policy before it is trained, or another model. ``prompts`` is the number of prompts of the data set.
        ``optimizer`` makes the one that replaces AdamW (:func:`tether.algorithms.optimise.optimizer_for`), from two
        parameter groups, the policy's and the critic's."""
        if optimizer is not None and config.critic_learning_rate is not None:
            raise ConfigError("an optimizer of your own has its own learning rates", hint="leave the critic's out")
        critic = Critic(policy, own_trunk=config.critic_trunk)
        rate = peak_learning_rate(config.optim, policy, usual=LEARNING_RATE)
        trained = [(policy.parameters(), rate), (critic.parameters(), config.critic_learning_rate or rate)]
        return State(
            policy=policy,
            reference=as_reference(reference, policy),
            critic=critic,
            optimizer=optimizer_for(trained, config.optim, optimizer),
            kl_coef=config.kl_coef,
            cursor=Cursor(prompts, seed),
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
    evaluate: Callable[[], Metrics] | None = None,
) -> StepResult:
    """One PPO step: roll out, score, estimate advantages, update.

    ``evaluate()`` is called when ``generator`` has the new weights, and its metrics are those of the step too.

    A step that was interrupted resumes within its update when it is called again with its prompts, also in a state
    restored from a checkpoint if ``generator`` and ``scorer`` return what they returned before. Other prompts are a
    :class:`ConfigError` until :meth:`State.abandon`.
    """
    where = f"ppo step {state.step + 1}"
    roll = partial(
        roll_out_all,
        prompts,
        generator=generator,
        scorer=scorer,
        policy=state.policy,
        group_size=config.group_size,
        sampling=config.sampling,
        seed=derive_seed(state.seed, "rollout", state.step),
        world=world,
    )
    rollouts = rollouts_of(state.update, prompts, roll, where=where, world=world)
    groups, clock = rollouts.groups, rollouts.clock
    update = state.update or collect(state, rollouts, prompts, config=config, where=where, world=world)
    state.update = update
    plan = plan_of(config)
    rows = len(update.experience.sampled.batch)
    if world.any(rows < len(prompts) * config.group_size):
        plan = replace(plan, minibatches=min(plan.minibatches, *world.gather(rows)))
    with clock.phase("update"):
        learned = learn(state, update, partial(objective, state, config=config), plan, where=where, world=world)
    publish(generator, state.step + 1, state.policy, clock)
    evaluation = evaluated(evaluate, clock)
    kl_coef = state.kl_coef
    if config.adaptive_kl_target is not None:
        samples, horizon = world.sum(len(prompts) * config.group_size), config.adaptive_kl_horizon
        kl_coef = adapt_kl_coef(kl_coef, update.kl, target=config.adaptive_kl_target, samples=samples, horizon=horizon)
    passes = learned.optimizer_steps / plan.minibatches
    figures = rollout_figures(groups) | clock.figures() | step_flops(state, groups, config, passes=passes)
    metrics = update.metrics | learned.metrics | {"optimizer_steps": float(learned.optimizer_steps)}
    metrics |= reduce(figures | rollouts.figures, world) | evaluation
    known = token_figures(groups, update.experience, update.left_out)
    state.update, state.kl_coef, state.step = None, kl_coef, state.step + 1
    return StepResult(metrics=metrics, groups=groups, figures=known)


def objective(state: State, part: TokenExperience, config: Config) -> tuple[LossInputs, LossTerms]:
    """The loss inputs of the rows in ``part``, and the loss of each of their tokens."""
    batch = part.sampled.batch
    states = completion_states(state.policy.base_model, batch)
    logp, entropy = logprobs_of_states(
        state.policy, states, batch, temperature=config.sampling.temperature, entropy=True
    )
    inputs = inputs_of(part.sampled, logp, entropy, part.advantages, old=config.old_logp)
    value = ValueInputs(values=state.critic(batch, lambda: states), old_values=part.values, returns=part.returns)
    return inputs, ppo_loss(
        surrogate_of(inputs, config.surrogate),
        inputs,
        value,
        value_clip=config.value_clip,
        value_coef=config.value_coef,
        entropy_coef=config.entropy_coef,
    )


def plan_of(config: Config) -> Plan:
    """The plan of a step's update."""
    return Plan(
        epochs=config.epochs_per_step,
        minibatches=config.minibatches,
        reduction="token_mean",
        max_length=config.sampling.max_new_tokens,
        optim=config.optim,
        measure_gap=not config.sampling.truncated,
        target_kl=float("inf") if config.target_kl is None else config.target_kl,
    )


def step_flops(state: State, groups: Sequence[ScoredGroup], config: Config, *, passes: float) -> Figures:
    """Model FLOPs of a step's phases (:mod:`tether.models.flops`); ``passes`` is the number of the update's epochs."""
    lengths = lengths_of(groups)
    policy = forward_flops(shape_of(state.policy), lengths)
    own_trunk, recomputed = state.critic.trunk is not None, config.old_logp == "pass"
    trunk = cast(PreTrainedModel, state.critic.trunk if own_trunk else state.policy.base_model)
    critic = forward_flops(shape_of(trunk), lengths)
    return {
        "flops/generate": Sum(policy),
        "flops/reference": Sum(policy * (1 + recomputed) + critic * (own_trunk or not recomputed)),
        "flops/update": Sum(training_factor(state.policy) * passes * (policy + critic * own_trunk)),
    }


def token_rewards(
    groups: Sequence[ScoredGroup], log_ratio: Tensor, *, kl_coef: float, missing_eos_penalty: float
) -> Tensor:
    """r_t = -kl_coef * k1_t + the score: at the last emitted token, or per token where the scorer gives token rewards.

    ``log_ratio`` = logp - ref_logp [B, T], of the completions to which a reward applies, 0 where the policy did not
    emit the token; the result is [B, T], 0 there too.
    """
    rewards = -kl_coef * k1(log_ratio)
    for row, (completion, score, total) in enumerate(scored(groups)):
        last = completion.last_emitted
        if score.token_rewards is None:
            rewards[row, last] += total
        else:
            rewards[row, : len(completion.ids)] += torch.tensor(score.token_rewards, device=rewards.device)
        if completion.finish_reason is FinishReason.LENGTH:
            rewards[row, last] -= missing_eos_penalty
    return rewards


def discounts(groups: Sequence[ScoredGroup], mask: Tensor, config: Config) -> float | Tensor:
    """gamma, or with ``discount = "turn"`` that of each token [B, T], of the completions to which a reward applies."""
    if config.discount == "token":
        return config.gamma
    stops = [[turn.stop for turn in completion.turns] for completion, *_ in scored(groups)]
    return turn_discounts(stops, mask, gamma=config.gamma)


def measured(state: State, groups: Sequence[ScoredGroup], config: Config, world: World) -> tuple[Sampled, Tensor]:
    """The completions with their log-probs, which come with the values where they are recomputed, and the values."""
    temperature = config.sampling.temperature

    def values_of(part: Batch) -> tuple[Tensor, ...]:
        states = cache(partial(completion_states, state.policy.base_model, part))
        values: Tensor = state.critic(part, states)
        if config.old_logp != "pass":
            return (values,)
        return values, *logprobs_of_states(state.policy, states(), part, temperature=temperature)

    masked = config.surrogate.mask_truncated
    measure = partial(sampled_of, groups, state.policy, state.reference, mask_truncated=masked)

    def passes(budget: int) -> tuple[Sampled, Tensor]:
        sampled = measure(temperature=temperature, token_budget=budget)
        values, *old = per_token(sampled.batch, values_of, token_budget=budget)
        return replace(sampled, old_logp=old[0]) if old else sampled, values

    return state.guard.fit(passes, world)


def collect(
    state: State, rollouts: Rollouts, prompts: Sequence[Prompt], *, config: Config, where: str, world: World
) -> Update[TokenExperience]:
    """An update that has not begun: log-prob, value, reward, return and advantage of every emitted token of the
    completions to which a reward applies."""
    groups, clock = rollouts.groups, rollouts.clock
    require_rewards(groups, where=where, world=world, alone=True)
    with clock.phase("reference"):
        sampled, values = measured(state, groups, config, world)
    with clock.phase("advantage"):
        metrics = reduce(kl_figures(sampled.old_logp, sampled.ref_logp, sampled.batch.mask, where=where), world)
        applies, left_out = applies_of(groups, torch.device("cpu")), None
        if applies is not None:
            left_out = sampled.ref_logp[~applies.flatten()]
            rows = applies.flatten().nonzero().squeeze(1)
            sampled = sampled.rows(rows)
            values = values[rows, : sampled.batch.mask.size(1)]
        mask = sampled.batch.mask
        rewards = token_rewards(
            groups,
            sampled.old_logp - sampled.ref_logp,
            kl_coef=state.kl_coef,
            missing_eos_penalty=config.missing_eos_penalty,
        )
        require_finite(rewards, what="the reward", where=where)
        if config.whiten_rewards:
            rewards = rescale(rewards, mask, across=world.sum)
        advantages, returns = gae(rewards, values, mask, gamma=discounts(groups, mask, config), lam=config.lam)
        unexplained = masked_var(returns - values, mask, across=world.sum)
        unexplained = unexplained / masked_var(returns, mask, across=world.sum).clamp(min=1e-8)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, across=world.sum)
    metrics |= {
        "kl_coef": state.kl_coef,
        "objective/non_score_reward": -state.kl_coef * metrics["kl"],
        "val/mean": float(masked_mean(values, mask, across=world.sum)),
        "val/return_mean": float(masked_mean(returns, mask, across=world.sum)),
        "val/explained_variance": 1.0 - float(unexplained),
    }
    experience = TokenExperience(sampled=sampled, values=values, advantages=advantages, returns=returns)
    return Update.begun(experience, rollouts, prompts, metrics, left_out=left_out)
