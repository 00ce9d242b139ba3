"""An alarm for rewards that do not tell the completions of a prompt apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tether.ops.advantages import zero_variance
from tether.types import Alarm, StepResult

PATIENCE = 5
"""Steps in a row after which the alarm is raised."""


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    flat_steps: int = 0
    """Latest steps in a row in which every group had equal rewards."""


@dataclass(kw_only=True)
class FlatRewards:
    """Raises one alarm when every group has had equal rewards for :data:`PATIENCE` steps in a row.

    A group of one completion has nothing to compare, so only groups of two and more count.
    """

    name: str = "flat_rewards"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        self.state.flat_steps = self.state.flat_steps + 1 if all_flat(result) else 0
        if self.state.flat_steps != PATIENCE:
            return ()
        message = (
            f"in steps {step - PATIENCE + 1} to {step} all completions of each prompt had equal rewards, so comparing "
            "them teaches nothing; check the reward, or sample more different completions (--group-size, --temperature)"
        )
        return (Alarm(monitor=self.name, message=message),)


def all_flat(result: StepResult) -> bool:
    """Whether there are groups of two and more completions, and each has equal rewards but for rounding."""
    totals = [[score.total for score in group.scores] for group in result.groups if len(group.scores) > 1]
    return bool(totals) and all(bool(zero_variance(torch.tensor(group))) for group in totals)
