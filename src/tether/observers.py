"""What observes a run: monitors, which have a saved state and raise alarms; hooks, which are plain functions; and
trackers, which show it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tether.types import Metrics, ScoredGroup, StepResult


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A problem that a monitor found at a step."""

    monitor: str
    """The name of the monitor."""
    message: str
    """What is wrong, with its figures."""
    since: int | None = None
    """The step since which it is so, where that is known."""
    phrase: str = ""
    """The words that it is about, if any."""
    examples: tuple[str, ...] = ()
    """The texts of a few completions, shortened."""
    advice: str = ""
    """What to do about it."""
    stop: bool = False
    """Whether the run has to stop after this step."""

    @property
    def in_full(self) -> str:
        """Message and advice as one line."""
        return f"{self.message}; {self.advice}" if self.advice else self.message


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Asks a run to end early, as if its last step were done: the model is saved, compared and summed up."""

    reason: str
    """Why, in words: ``summary.json`` and the last line say it."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A recorded step: what hooks and trackers are given."""

    command: str
    """The command of the run, such as ``grpo``."""
    step: int
    """From 1."""
    total: int
    """Steps of the whole run."""
    metrics: Metrics
    """The row of ``metrics.jsonl``."""
    groups: tuple[ScoredGroup, ...]
    """The step's rollouts, if any."""
    alarms: tuple[Alarm, ...]
    model: nn.Module
    """The model that is trained, after the step."""


Hook = Callable[[StepRecord], "Stop | None"]
"""A function of a recorded step. It is called when the row is written, and may ask the run to end."""


class Monitor(Protocol):
    """Watches a run. It is called after each step, before the step is recorded, and can change neither."""

    name: str
    state: Any
    """A dataclass with everything a resumed run needs; checkpoints hold it under the monitor's name."""

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm | Stop]:
        """The alarms of step ``step``, from 1, and whether the run is to end early."""
        ...


class Tracker(Protocol):
    """Shows a run elsewhere, as it is recorded. It raises nothing, and rank 0 alone calls it."""

    def log(self, record: StepRecord) -> None:
        """A step has its row."""
        ...

    def finish(self, summary: Mapping[str, Any], *, step: int) -> None:
        """The run is finished after ``step``, and ``summary.json`` is written."""
        ...

    def close(self) -> None:
        """The process leaves the run, finished or not. Called once, where it was locked."""
        ...
