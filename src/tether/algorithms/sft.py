"""Supervised fine-tuning: maximum likelihood of completions given their prompts.

loss = -sum over completion tokens of log pi(a_t | s_t) / completion tokens of the step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from tether.algorithms.optimise import (
    Guard,
    Optim,
    adamw,
    guarded_step,
    lr_scale,
    peak_learning_rate,
    require_finite,
)
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor, micro_batches
from tether.errors import ConfigError
from tether.interruption import stoppable
from tether.models.flops import forward_flops, shape_of
from tether.models.policy import completion_logprobs
from tether.ops.losses import likelihood
from tether.ops.reduce import token_mean
from tether.types import Batch, Demonstration, Metrics

LEARNING_RATE = 2e-5
"""Usual for a model of 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of supervised fine-tuning."""

    epochs: float = 1.0
    """Passes over the demonstrations."""
    batch_size: int = 32
    """Demonstrations an optimiser step."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass; it does not change the gradient."""
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "epochs must be positive": self.epochs > 0,
                "batch_size must be at least 1": self.batch_size >= 1,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
            }
        )

    def total_steps(self, demonstrations: int) -> int:
        """Optimiser steps for this many demonstrations; fewer than ``batch_size`` are one step an epoch."""
        return max(1, round(self.epochs * demonstrations / min(self.batch_size, demonstrations)))


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    policy: PreTrainedModel
    optimiser: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    total_steps: int
    step: int = 0
    row: Metrics = field(default_factory=dict)
    """Of the last step, as long as its evaluation is due."""

    @staticmethod
    def create(policy: PreTrainedModel, demonstrations: int, config: Config, *, seed: int) -> State:
        return State(
            policy=policy,
            optimiser=adamw(
                [(policy.parameters(), peak_learning_rate(config.optim, policy, usual=LEARNING_RATE))], config.optim
            ),
            cursor=Cursor(demonstrations, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(demonstrations),
        )


def step(state: State, demonstrations: Sequence[Demonstration], *, config: Config) -> Metrics:
    """One optimiser step on ``demonstrations``."""
    clock = PhaseClock(state.policy.device)
    with clock.phase("update"):
        metrics = update(state, demonstrations, config=config)
    lengths = [(len(d.prompt_ids), [len(d.completion_ids)]) for d in demonstrations]
    metrics["flops/update"] = 3 * forward_flops(shape_of(state.policy), lengths)
    return metrics | clock.metrics()


def update(state: State, demonstrations: Sequence[Demonstration], *, config: Config) -> Metrics:
    """Gradient and optimiser step; without ``loss`` and what belongs to it where the step was skipped."""
    where = f"sft step {state.step + 1}"
    batch = collate(demonstrations, state.policy.device)
    tokens = int(batch.mask.sum())

    def gradient(token_budget: int) -> float:
        total = 0.0
        for part in stoppable(micro_batches(batch, token_budget)):
            micro = batch.rows(part)
            (logp,) = completion_logprobs(state.policy, micro, temperature=1.0)
            loss = token_mean(likelihood(logp), micro.mask, tokens=tokens)
            require_finite(loss, what="the loss", where=where)
            loss.backward()
            total += loss.item()
        return total

    scale = lr_scale(config.optim, state.step, state.total_steps)
    taken = guarded_step(state.guard, state.optimiser, gradient, scale=scale, config=config.optim, where=where)
    state.step += 1
    figures = {"loss": taken[0], **taken[1]} if taken else {}
    return figures | state.guard.metrics() | {"num_tokens": float(batch.lengths.sum())}


@torch.no_grad()
def evaluate(policy: PreTrainedModel, demonstrations: Sequence[Demonstration], *, token_budget: int) -> Metrics:
    """``eval/loss``: mean negative log-likelihood of the completion tokens, in nats."""
    batch = collate(demonstrations, policy.device)
    total = 0.0
    for part in stoppable(micro_batches(batch, token_budget)):
        (logp,) = completion_logprobs(policy, batch.rows(part), temperature=1.0)
        total -= float(logp.sum())
    return {"eval/loss": total / int(batch.mask.sum())}


def collate(demonstrations: Sequence[Demonstration], device: torch.device) -> Batch:
    """Demonstrations as a batch."""
    return Batch.collate([(d.prompt_ids, d.completion_ids) for d in demonstrations], device)
