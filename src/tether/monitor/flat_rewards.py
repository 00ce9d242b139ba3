"""An alarm for rewards that do not tell the completions of a prompt apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tether.observers import Alarm
from tether.ops.advantages import ZERO_VARIANCE, zero_variance
from tether.types import StepResult

PATIENCE = 5
"""Steps in a row after which the alarm is raised."""

ROUNDING = 1e-12
"""Rewards that differ by less than this share of their size differ by the rounding of a sum, and are called equal."""


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    flat_steps: int = 0
    """Latest steps in a row in which every group had equal rewards."""
    widest: float = 0.0
    """The largest difference within a group in these steps, in units of reward."""
    largest: float = 0.0
    """The largest reward in these steps, by its size."""


@dataclass(kw_only=True)
class FlatRewards:
    """Raises one alarm when every group has had equal rewards for :data:`PATIENCE` steps in a row.

    Rewards that differ by less than rounding could make are equal to the algorithm; the alarm then says that they
    differ, and by how much. A group of one reward has nothing to compare, so only groups of two and more count.
    """

    stop: bool = False
    name: str = "flat_rewards"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        groups = compared(result)
        if not all_flat(groups):
            self.state = State()
            return ()
        self.state.flat_steps += 1
        self.state.widest = max(self.state.widest, *(max(group) - min(group) for group in groups))
        self.state.largest = max(self.state.largest, *(abs(total) for group in groups for total in group))
        if self.state.flat_steps != PATIENCE:
            return ()
        message = f"in steps {step - PATIENCE + 1} to {step} all completions of each prompt had {self._finding()}"
        return (Alarm(monitor=self.name, message=message, since=step - PATIENCE + 1, stop=self.stop),)

    def _finding(self) -> str:
        if self.state.widest <= ROUNDING * self.state.largest:
            return (
                "equal rewards, so comparing them teaches nothing; check the reward, or sample more different "
                "completions (--group-size, --temperature)"
            )
        remedy = (
            f"give the reward a weight (--reward SPEC={0.1 / self.state.widest:.0e})"
            if self.state.largest <= 1.0
            else "subtract what all rewards have in common"
        )
        return (
            f"rewards that differ by at most {self.state.widest:.1e}, and rewards of this size (up to "
            f"{self.state.largest:.1e}) count as equal below a standard deviation of "
            f"{ZERO_VARIANCE * max(1.0, self.state.largest):.0e}, because rounding could make the difference; if it is "
            f"not rounding, {remedy}"
        )


def compared(result: StepResult) -> list[list[float]]:
    """The rewards of each group that has two and more."""
    totals = [[score.total for score in group.scores if score.total is not None] for group in result.groups]
    return [group for group in totals if len(group) > 1]


def all_flat(groups: Sequence[Sequence[float]]) -> bool:
    """Whether there are groups, and each has equal rewards but for rounding."""
    return bool(groups) and all(bool(zero_variance(torch.tensor(group))) for group in groups)
