"""Proximal policy optimisation on tokens (Schulman et al. 2017, arXiv 1707.06347; for text, Ziegler et al. 2019).

    r_t = -kl_coef * (logp_t - ref_logp_t), plus the score at the last emitted token or the scorer's reward of each
    A_t, R_t = GAE(r, V; gamma, lam)
    loss = mean_t clipped surrogate + value_coef * mean_t clipped value loss - entropy_coef * mean_t entropy

Departures from the textbook: a state is a prompt and the tokens so far and an action is a token, so a trajectory is a
completion and none is ever cut by the rollout; the step's denominators are counted before it is split; the gradients of
policy and critic are clipped apart, so that a large value loss does not shrink the policy's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

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
    flat,
    kl_metrics,
    lengths_of,
    logprob_gap,
    old_logprobs,
    per_token,
    policy_logprobs,
    rollout_metrics,
)
from tether.data.batching import Cursor, micro_batches
from tether.errors import ConfigError
from tether.interruption import stoppable
from tether.models.flops import forward_flops, shape_of
from tether.models.policy import Critic, completion_states, logprobs_of_states, reference_of
from tether.ops.divergence import adapt_kl_coef, k1, k2
from tether.ops.losses import clipped_surrogate, clipped_value
from tether.ops.masked import masked_mean, masked_var, whiten
from tether.ops.reduce import token_mean
from tether.ops.returns import gae
from tether.seeds import derive_seed
from tether.types import Batch, Finish, Generator, Metrics, Prompt, Sampling, ScoredGroup, Scorer, StepResult

LEARNING_RATE = 1e-6
"""Usual for a model of 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PPO."""

    group_size: int = 1
    """Completions a prompt."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference in each token's reward; the starting one when kl_target is set."""
    kl_target: float | None = None
    """Adapt kl_coef towards this KL, in nats a completion."""
    kl_horizon: int = 10_000
    """Completions over which the adaptive coefficient moves."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's trade of bias (0) for variance (1)."""
    epochs_per_step: int = 2
    """Passes over a step's completions."""
    minibatches: int = 1
    """Optimiser steps a pass."""
    clip_eps: float = 0.2
    """The ratio counts up to 1 +- this."""
    value_clip_eps: float = 0.2
    """The new value counts up to the old one +- this."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    target_kl: float | None = None
    """Stop a step's passes once the policy has moved this far from its own rollouts, in nats a token."""
    whiten_rewards: bool = False
    """Scale the rewards to unit standard deviation over the step, their mean kept."""
    whiten_advantages: bool = True
    """Centre and scale the advantages over the step."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a completion that was cut at the length limit."""
    critic_trunk: bool = False
    """The critic has a trunk of its own, copied from the policy; otherwise its head reads the policy's states, which
    halves the arithmetic of an update and the optimiser's memory."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic; the policy's unless given."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass; it does not change the gradient."""
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=lambda: Optim(adam_beta2=0.95, adam_eps=1e-5))

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "group_size must be at least 1": self.group_size >= 1,
                "kl_coef must be 0 or more": self.kl_coef >= 0,
                "kl_target must be positive": self.kl_target is None or self.kl_target > 0,
                "kl_target needs a kl_coef above 0 to start from": self.kl_target is None or self.kl_coef > 0,
                "kl_horizon must be positive": self.kl_horizon > 0,
                "gamma must lie in [0, 1]": 0 <= self.gamma <= 1,
                "lam must lie in [0, 1]": 0 <= self.lam <= 1,
                "epochs_per_step must be at least 1": self.epochs_per_step >= 1,
                "minibatches must be at least 1": self.minibatches >= 1,
                "clip_eps must lie in (0, 1)": 0 < self.clip_eps < 1,
                "value_clip_eps must be positive": self.value_clip_eps > 0,
                "value_coef must be positive": self.value_coef > 0,
                "target_kl must be positive": self.target_kl is None or self.target_kl > 0,
                "critic_learning_rate must be positive": self.critic_learning_rate is None
                or self.critic_learning_rate > 0,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
                "temperature must be above 0: PPO learns from sampled tokens": self.sampling.temperature > 0,
            }
        )


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: Critic
    optimiser: torch.optim.Optimizer
    cursor: Cursor
    kl_coef: float
    seed: int
    total_steps: int
    guard: Guard
    step: int = 0
    update: Update[Experience] | None = None
    """Of the step that has rolled out and not learned all of it yet; None between steps."""

    @staticmethod
    def create(policy: PreTrainedModel, config: Config, *, prompts: int, total_steps: int, seed: int) -> State:
        """A fresh state; the reference is the policy as it is now. ``prompts`` is how many the cursor walks over."""
        critic = Critic(policy, own_trunk=config.critic_trunk)
        rate = peak_learning_rate(config.optim, policy, usual=LEARNING_RATE)
        return State(
            policy=policy,
            reference=reference_of(policy),
            critic=critic,
            optimiser=adamw(
                [(policy.parameters(), rate), (critic.parameters(), config.critic_learning_rate or rate)], config.optim
            ),
            kl_coef=config.kl_coef,
            cursor=Cursor(prompts, seed),
            seed=seed,
            total_steps=total_steps,
            guard=Guard(token_budget=config.micro_batch_tokens),
        )


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What a step learns from. All tensors but the batch's are [B, T], 0 at padding, without gradient."""

    batch: Batch
    old_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        batch = self.batch.rows(index)
        width = int(batch.completion_lengths.max())
        return Experience(
            batch=batch,
            old_logp=self.old_logp[index, :width],
            values=self.values[index, :width],
            advantages=self.advantages[index, :width],
            returns=self.returns[index, :width],
        )


def step(state: State, prompts: Sequence[Prompt], *, generate: Generator, score: Scorer, config: Config) -> StepResult:
    """One PPO step: roll out, score, estimate advantages, update.

    A step that was left half-way goes on where its update was, if ``generate`` and ``score`` give again what they gave
    then.
    """
    where = f"ppo step {state.step + 1}"
    clock = PhaseClock(state.policy.device)
    with clock.phase("generate"):
        rollouts = generate.generate(
            prompts,
            group_size=config.group_size,
            sampling=config.sampling,
            seed=derive_seed(state.seed, "rollout", state.step),
        )
    with clock.phase("score"):
        groups = tuple(score.score(rollouts))
    if state.update is None:
        state.update = collect(state, groups, config=config, where=where, clock=clock)
    with clock.phase("update"):
        metrics = state.update.metrics | learn(state, state.update, config=config, where=where)
    if config.kl_target is not None:
        state.kl_coef = adapt_kl_coef(
            state.kl_coef,
            metrics["kl"],
            target=config.kl_target,
            samples=sum(len(group.scores) for group in groups),
            horizon=config.kl_horizon,
        )
    state.update = None
    state.step += 1
    with clock.phase("update"):
        generate.load_weights(state.step, state.policy.named_parameters())
    passes = metrics["optimiser_steps"] / config.minibatches
    metrics |= rollout_metrics(groups) | generate.figures() | clock.metrics()
    metrics |= step_flops(state, groups, config, passes=passes)
    return StepResult(metrics=metrics, groups=groups)


def step_flops(state: State, groups: Sequence[ScoredGroup], config: Config, *, passes: float) -> Metrics:
    """Model FLOPs of a step's phases (:mod:`tether.models.flops`); ``passes`` of the update over the experience."""
    lengths = lengths_of(groups)
    policy = forward_flops(shape_of(state.policy), lengths)
    own_trunk = state.critic.trunk is not None
    trunk = cast(PreTrainedModel, state.critic.trunk if own_trunk else state.policy.base_model)
    critic = forward_flops(shape_of(trunk), lengths)
    return {
        "flops/generate": policy,
        "flops/reference": policy * (1 + config.sampling.truncated) + critic,
        "flops/update": 3 * passes * (policy + critic * own_trunk),
    }


def token_rewards(
    groups: Sequence[ScoredGroup], log_ratio: Tensor, *, kl_coef: float, missing_eos_penalty: float
) -> Tensor:
    """r_t = -kl_coef * k1_t + the score: at the last emitted token, or token by token where the scorer says so.

    ``log_ratio`` = logp - ref_logp [B, T], 0 at padding; the result is [B, T].
    """
    rewards = -kl_coef * k1(log_ratio)
    for row, (completion, score) in enumerate(flat(groups)):
        last = len(completion.ids) - 1
        if score.token_rewards is None:
            rewards[row, last] += score.total
        else:
            rewards[row, : last + 1] += torch.tensor(score.token_rewards, device=rewards.device)
        if completion.finish is Finish.LENGTH:
            rewards[row, last] -= missing_eos_penalty
    return rewards


def collect(
    state: State, groups: Sequence[ScoredGroup], *, config: Config, where: str, clock: PhaseClock
) -> Update[Experience]:
    """Log-prob, value, reward, return and advantage of every token: an update that has not begun."""
    batch = batch_of(groups, state.policy.device)
    mask = batch.mask

    def passes(budget: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            old_logprobs(state.policy, groups, batch, sampling=config.sampling, token_budget=budget),
            policy_logprobs(state.reference, batch, temperature=config.sampling.temperature, token_budget=budget),
            per_token(
                batch,
                lambda part: state.critic(part, lambda: completion_states(state.policy.base_model, part)),
                token_budget=budget,
            ),
        )

    with clock.phase("reference"):
        old_logp, ref_logp, values = state.guard.fit(passes)
    with clock.phase("advantage"):
        metrics = kl_metrics(old_logp, ref_logp, mask, where=where)
        rewards = token_rewards(
            groups, old_logp - ref_logp, kl_coef=state.kl_coef, missing_eos_penalty=config.missing_eos_penalty
        )
        require_finite(rewards, what="the reward", where=where)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        experience = Experience(
            batch=batch,
            old_logp=old_logp,
            values=values,
            advantages=whiten(advantages, mask, shift_mean=True) if config.whiten_advantages else advantages,
            returns=returns,
        )
    unexplained = masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)
    metrics |= {
        "kl_coef": state.kl_coef,
        "objective/non_score_reward": -state.kl_coef * metrics["kl"],
        "val/mean": float(masked_mean(values, mask)),
        "val/return_mean": float(masked_mean(returns, mask)),
        "val/explained_variance": 1.0 - float(unexplained),
    }
    return Update(experience=experience, metrics=metrics)


def learn(state: State, update: Update[Experience], *, config: Config, where: str) -> Metrics:
    """``epochs_per_step`` passes of ``minibatches`` optimiser steps over the experience, or fewer by ``target_kl``."""
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
            row = {
                "loss/policy": figures.mean("policy_loss"),
                "loss/value": figures.mean("value_loss"),
                "entropy": figures.mean("entropy"),
                "policy/approxkl": figures.mean("approxkl"),
                "policy/clipfrac": figures.mean("clipped"),
                "val/clipfrac": figures.mean("value_clipped"),
                "val/ratio": figures.mean("ratio"),
            }
            if config.target_kl is not None and update.rows and row["policy/approxkl"] > config.target_kl:
                raise FarEnough
            return row

        try:
            taken = guarded_step(state.guard, state.optimiser, gradient, scale=scale, config=config.optim, where=where)
        except FarEnough:
            state.optimiser.zero_grad()
            break
        if taken:
            update.rows.append(taken[0] | taken[1])
    return mean_of(update.rows) | update.gap | state.guard.metrics() | {"optimiser_steps": float(len(update.rows))}


class FarEnough(Exception):  # noqa: N818 - no error
    """The policy has moved by ``target_kl``."""


def backward(state: State, experience: Experience, *, config: Config, token_budget: int, where: str) -> TokenFigures:
    """Accumulate the gradient of one minibatch, micro-batch by micro-batch, over one denominator."""
    tokens = int(experience.batch.mask.sum())
    figures = TokenFigures(experience.batch.mask)
    for rows in stoppable(micro_batches(experience.batch, token_budget)):
        micro = experience.rows(rows)
        states = completion_states(state.policy.base_model, micro.batch)
        logp, entropy = logprobs_of_states(
            state.policy, states, micro.batch, temperature=config.sampling.temperature, entropy=True
        )
        values = state.critic(micro.batch, lambda states=states: states)
        log_ratio = logp - micro.old_logp
        policy_loss, clipped = clipped_surrogate(
            log_ratio, micro.advantages, clip_low=config.clip_eps, clip_high=config.clip_eps
        )
        value_loss, value_clipped = clipped_value(values, micro.values, micro.returns, clip=config.value_clip_eps)
        loss = policy_loss + config.value_coef * value_loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy
        total = token_mean(loss, micro.batch.mask, tokens=tokens)
        require_finite(total, what="the loss", where=where)
        total.backward()
        figures.put(
            rows,
            logp=logp,
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropy,
            approxkl=k2(log_ratio),
            ratio=log_ratio.exp(),
            clipped=clipped,
            value_clipped=value_clipped,
        )
    return figures
