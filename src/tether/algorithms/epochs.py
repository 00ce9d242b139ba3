"""The training loop over a data set, epoch by epoch, for fine-tuning, reward models and other training on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.optimise import Accumulated, Guard, Optim, accumulate, apply, lr_scale
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor
from tether.errors import ConfigError
from tether.models.adapters import adapter_dropout
from tether.models.balance import Balance
from tether.stop_requests import at_safe_points
from tether.types import Metrics, StepResult
from tether.world import World

R = TypeVar("R")


@dataclass(frozen=True)
class Spread:
    """``count`` evaluations in every ``steps`` steps, evenly spread, the last after the last of them."""

    count: int
    steps: int

    def due(self, step: int) -> bool:
        """Whether one is due after ``step``, from 1."""
        return step * self.count // self.steps > (step - 1) * self.count // self.steps


def descend(
    state: TrainedOnRows,
    model: PreTrainedModel,
    parts: Callable[[int], Iterable[Tensor]],
    loss_of: Callable[[Tensor], Tensor],
    *,
    optim: Optim,
    where: str,
    world: World,
) -> tuple[Accumulated, Metrics | None]:
    """The optimizer step of rows: the gradient of ``loss_of`` over ``parts`` (:func:`accumulate`), with the dropout of
    an adapter and the balance of experts, and the update (:func:`apply`), whose metrics are None if it was skipped."""
    with adapter_dropout(model, "dropout", state.cursor.seed, state.step):
        accumulated = accumulate(state.guard, state.optimizer, parts, loss_of, balance=Balance.of(model), world=world)
    taken = apply(
        state.guard,
        state.optimizer,
        accumulated,
        scale=lr_scale(optim, state.step, state.total_steps),
        config=optim,
        where=where,
        world=world,
    )
    state.step += 1
    return accumulated, taken


class EpochState(Protocol):
    """The part of an algorithm's state that the loop uses."""

    cursor: Cursor
    step: int
    pending: Metrics | None
    """Metrics of the last step until they are yielded, with ``time/eval`` once its held-out evaluation, if one is due,
    is done; otherwise None."""

    @property
    def device(self) -> torch.device: ...


class TrainedOnRows(EpochState, Protocol):
    """The part of an algorithm's state that an optimizer step uses."""

    optimizer: torch.optim.Optimizer
    guard: Guard
    total_steps: int


def epochs(
    state: EpochState,
    rows: Sequence[R],
    *,
    batch_size: int,
    step: Callable[[list[R]], StepResult],
    over: Callable[[], bool],
    evaluate: Callable[[], Metrics] | None = None,
    due: Callable[[], bool] = lambda: False,
) -> Iterator[StepResult]:
    """Run steps of ``batch_size`` rows until ``over()``, and yield each result once its evaluation is done.

    Every epoch takes each row once, so that its last step may have fewer rows. If ``due()`` after a step,
    ``evaluate()`` adds held-out figures to its metrics. If a step or an evaluation raises, the state is as it was
    before, and a new loop resumes from there; an interrupt takes effect there too.
    """
    while state.pending is not None or not over():
        with at_safe_points():
            if state.pending is None:
                with state.cursor.rollback_on_error():
                    state.pending = step(state.cursor.take_in_epoch(rows, batch_size)).metrics
            if evaluate is not None and due() and "time/eval" not in state.pending:
                clock = PhaseClock(state.device)
                with clock.phase("eval"):
                    found = evaluate()
                state.pending = state.pending | found | clock.metrics()
        metrics, state.pending = state.pending, None
        yield StepResult(metrics=metrics)


def require_settled(state: EpochState, *, where: str) -> None:
    """Raise :class:`ConfigError` where an interrupted loop still holds the metrics of the last step: a step on its own
    would give its row to another one."""
    if state.pending is not None:
        raise ConfigError(
            "the last step's held-out evaluation was interrupted, and its metrics are pending",
            where=where,
            hint="resume with steps(), or drop them with state.abandon()",
        )
