"""The training loop over a data set, epoch by epoch, for fine-tuning, reward models and other training on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor
from tether.types import Metrics, StepResult

R = TypeVar("R")


class EpochState(Protocol):
    """The part of an algorithm's state that the loop uses."""

    cursor: Cursor
    step: int
    pending: Metrics | None
    """Metrics of the last step while its held-out evaluation is due; otherwise None."""

    @property
    def device(self) -> torch.device: ...


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
    before, and a new loop resumes from there.
    """
    while state.pending is not None or not over():
        if state.pending is None:
            with state.cursor.rollback_on_error():
                state.pending = step(state.cursor.take_in_epoch(rows, batch_size)).metrics
        metrics = state.pending
        if evaluate is not None and due():
            clock = PhaseClock(state.device)
            with clock.phase("eval"):
                metrics = metrics | evaluate()
            metrics |= clock.metrics()
        state.pending = None
        yield StepResult(metrics=metrics)
