"""Supervised fine-tuning: maximum likelihood of completions given their prompts.

loss = -sum over completion tokens of log pi(a_t | s_t) / completion tokens of the step
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.epochs import descend, epochs, require_settled
from tether.algorithms.optimise import (
    Guard,
    Optim,
    OptimizerFactory,
    optimizer_for,
    peak_learning_rate,
)
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor, epoch_steps, micro_batches
from tether.errors import ConfigError
from tether.figures import Figures, Sum, reduce
from tether.models.flops import training_flops
from tether.models.policy import completion_logprobs
from tether.ops.losses import negative_log_likelihood
from tether.ops.reduce import token_mean
from tether.stop_requests import at_safe_points, stoppable
from tether.types import Batch, Demonstration, Metrics, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 2e-5
"""The usual rate for a model with 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of supervised fine-tuning."""

    epochs: float = 1.0
    """Epochs over the demonstrations; a fraction is rounded up in steps."""
    batch_size: int = 32
    """Demonstrations per optimizer step; the last step of an epoch may have fewer."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "epochs must be positive": self.epochs > 0,
                "batch_size must be at least 1": self.batch_size >= 1,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
            },
        )

    def total_steps(self, demonstrations: int) -> int:
        """Optimizer steps for this many demonstrations (:func:`tether.data.batching.epoch_steps`)."""
        return epoch_steps(self.epochs, count=demonstrations, batch_size=self.batch_size)


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    total_steps: int
    step: int = 0
    pending: Metrics | None = None
    """Metrics of the last step until :func:`steps` has evaluated and given them; otherwise None."""

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @staticmethod
    def create(
        policy: PreTrainedModel,
        demonstrations: int,
        config: Config,
        *,
        seed: int,
        optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
    ) -> State:
        """A new state for a data set of this many ``demonstrations``; ``optimizer`` replaces AdamW
        (:func:`tether.algorithms.optimise.optimizer_for`)."""
        rate = peak_learning_rate(config.optim, policy, usual=LEARNING_RATE)
        return State(
            policy=policy,
            optimizer=optimizer_for([(policy.parameters(), rate)], config.optim, optimizer),
            cursor=Cursor(demonstrations, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(demonstrations),
        )

    def abandon(self) -> None:
        """Drop the metrics of a step whose evaluation was interrupted; the step stays taken."""
        self.pending = None


@at_safe_points()
def step(state: State, demonstrations: Sequence[Demonstration], *, config: Config, world: World = ALONE) -> StepResult:
    """One optimizer step on ``demonstrations``. A skipped step has no ``loss`` or other figures of the update.

    A step that is interrupted before it changes the weights counts as not begun.
    """
    require_settled(state, where=f"sft step {state.step + 1}")
    clock = PhaseClock(state.device)
    with clock.phase("update"):
        figures, taken = update(state, demonstrations, config=config, world=world)
    lengths = [(len(d.prompt_ids), [len(d.completion_ids)]) for d in demonstrations]
    figures["flops/update"] = Sum(training_flops(state.policy, lengths))
    return StepResult(metrics=reduce(figures | clock.figures(), world) | taken | state.guard.metrics())


def update(
    state: State, demonstrations: Sequence[Demonstration], *, config: Config, world: World
) -> tuple[Figures, Metrics]:
    """Compute the gradient and take the optimizer step."""
    batch = collate(demonstrations, state.device)
    tokens = int(world.sum(batch.mask.sum()))

    def loss_of(part: Tensor) -> Tensor:
        micro = batch.rows(part)
        (logp,) = completion_logprobs(state.policy, micro, temperature=1.0)
        return token_mean(negative_log_likelihood(logp), micro.mask, tokens=tokens)

    accumulated, taken = descend(
        state,
        state.policy,
        partial(micro_batches, batch),
        loss_of,
        optim=config.optim,
        where=f"sft step {state.step + 1}",
        world=world,
    )
    figures: Figures = {"num_tokens": Sum(float(batch.lengths.sum()))}
    return (figures, {}) if taken is None else (figures | {"loss": Sum(accumulated.loss)}, taken)


def steps(
    state: State,
    data: Sequence[Demonstration],
    held_out: Sequence[Demonstration] = (),
    *,
    config: Config,
    world: World = ALONE,
) -> Iterator[StepResult]:
    """All remaining steps, with the held-out loss at the end of each epoch."""
    per_epoch = epoch_steps(1, count=len(data), batch_size=config.batch_size)

    def measure() -> Metrics:
        return state.guard.fit(lambda budget: evaluate(state.policy, held_out, token_budget=budget), world)

    return epochs(
        state,
        data,
        batch_size=config.batch_size,
        step=lambda rows: step(state, rows, config=config, world=world),
        over=lambda: state.step >= state.total_steps,
        evaluate=measure if held_out else None,
        due=lambda: state.step % per_epoch == 0 or state.step == state.total_steps,
    )


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
    masks = [d.completion_mask or (True,) * len(d.completion_ids) for d in demonstrations]
    return Batch.collate([(d.prompt_ids, d.completion_ids) for d in demonstrations], device, masks=masks)
