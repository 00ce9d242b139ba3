"""Ends a run early: when the policy is too far from its reference, or when a metric has stopped to improve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tether.names import metric_and_sign
from tether.observers import Stop
from tether.types import Metrics, StepResult


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    recent_kl: list[float] = field(default_factory=list)
    """The last values of the KL that is watched, oldest first."""
    best: float | None = None
    """The best value of the metric so far, None before the first."""
    best_step: int = 0
    """The step that it is of."""
    without_better: int = 0
    """Values in a row since then, none of which was better."""


@dataclass(kw_only=True)
class EarlyStopping:
    """Asks the run to end where one of two limits is passed; each counts only the rows that have its metric.

    * The mean of the last ``window`` values of ``kl`` exceeds ``stop_kl``, in nats per completion.
    * ``patience`` values of ``metric`` in a row were not better than the best before them; a minus before the name of
      the metric means that lower is better.

    ``stop_kl`` None and ``patience`` 0 are no limits.
    """

    stop_kl: float | None
    kl: str
    window: int
    patience: int
    metric: str
    name: str = "early_stopping"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Stop]:
        reasons = [self._too_far(result.metrics), self._no_better(step, result.metrics)]
        return [Stop(reason=reason) for reason in reasons if reason]

    def _too_far(self, metrics: Metrics) -> str:
        """Why the KL ends the run, or ""."""
        if self.kl not in metrics:
            return ""
        recent = self.state.recent_kl = [*self.state.recent_kl, metrics[self.kl]][-self.window :]
        mean = sum(recent) / len(recent)
        if self.stop_kl is None or len(recent) < self.window or mean <= self.stop_kl:
            return ""
        what = self.kl if self.window == 1 else f"{self.kl} of the last {self.window} steps"
        return f"{what} is {mean:.3g} nats per completion, above {self.stop_kl:g}"

    def _no_better(self, step: int, metrics: Metrics) -> str:
        """Why the metric ends the run, or ""."""
        metric, sign = metric_and_sign(self.metric)
        if metric not in metrics:
            return ""
        value, state = metrics[metric], self.state
        if state.best is None or sign * value > sign * state.best:
            state.best, state.best_step, state.without_better = value, step, 0
            return ""
        state.without_better += 1
        if not self.patience or state.without_better < self.patience:
            return ""
        best = f"{state.best:.4g} at step {state.best_step}"
        unit = "evaluation" if metric.startswith("eval/") else "step"
        return f"{metric} no better in {state.without_better} {unit}{'s' * (state.without_better > 1)} than {best}"
