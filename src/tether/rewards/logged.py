"""What a reward function is told of the run, and what it logs besides its values, under TRL's names.

    def my_reward(completions, trainer_state, log_metric, log_extra, **columns): ...

``trainer_state`` has ``global_step``, the steps that the run has taken, ``max_steps``, those that it has in all, and
``epoch``, the share of them. ``log_metric(name, value)`` adds a metric, ``logged/NAME`` of the step's row: the mean
over the completions that it was logged for. ``log_extra(column, values)`` adds a column ``extra/COLUMN`` to the step's
rollouts, a value for each completion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tether.errors import RewardError
from tether.untrusted import shown

NAMES = ("trainer_state", "log_metric", "log_extra")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    global_step: int = 0
    max_steps: int = 0
    """0 outside of a run."""

    @property
    def epoch(self) -> float | None:
        """The share of the steps that are taken; None outside of a run."""
        return self.global_step / self.max_steps if self.max_steps else None


OUTSIDE = Progress()
_progress: ContextVar[Progress] = ContextVar("progress", default=OUTSIDE)


def set_progress(taken: int, total: int) -> None:
    """Reward functions that are called from now on are told that ``taken`` of ``total`` steps are taken."""
    _progress.set(Progress(global_step=taken, max_steps=total))


@dataclass
class Logged:
    """What one call of the reward ``reward`` for ``count`` completions logs."""

    reward: str
    count: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """What the function is given by name."""
        return dict(zip(NAMES, (_progress.get(), self.log_metric, self.log_extra), strict=True))

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number; of several under one name the mean counts."""
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise RewardError(f"reward {self.reward!r} logged {shown(value)} as {name!r}, no finite number")
        self.metrics.setdefault(str(name), []).append(float(number))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a value for each completion."""
        texts = [as_text(value) for value in values]
        if len(texts) != self.count:
            raise RewardError(
                f"reward {self.reward!r} logged {len(texts)} values of {column!r} for {self.count} completions"
            )
        self.columns[str(column)] = texts

    def of_call(self) -> Mapping[str, float]:
        """The metrics."""
        return {name: fmean(values) for name, values in self.metrics.items()}

    def of_completion(self, index: int) -> Mapping[str, str]:
        """What was logged for one completion."""
        return {column: values[index] for column, values in self.columns.items()}


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
