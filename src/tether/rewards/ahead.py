"""Rewards that wait for something elsewhere, asked about groups while others are still sampled.

Of each reward one call is under way at a time, for all groups that have finished since the last one began: a step then
asks in a few calls what it would ask in one, and no more at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tether.errors import RewardError
from tether.rewards.waiting import Tries, Waiting, finished
from tether.types import RolloutGroup

T = TypeVar("T")


@dataclass
class Ahead(Generic[T]):
    """The calls of one reward for the groups of a step; ``ask`` makes one, whose result has an entry per group."""

    name: str
    ask: Callable[[Sequence[RolloutGroup]], Waiting[list[T]]]
    waiting: list[RolloutGroup] = field(default_factory=list)
    """Groups that no call is about yet."""
    asked: list[RolloutGroup] = field(default_factory=list)
    """Those that the present call is about."""
    call: Tries[list[T]] | None = None
    known: list[tuple[RolloutGroup, T]] = field(default_factory=list)

    def begin(self, group: RolloutGroup) -> None:
        """Ask about ``group``, now or as soon as the present call is over. Raises :class:`RewardError` where that has
        failed."""
        self.waiting.append(group)
        if self.call is not None and self.call.over:
            self.call.settle(time.monotonic())
            self.take()
        if self.call is None:
            asked = self.ask(self.waiting)
            if asked.apart.own:  # what its code sets for the whole process is not for the time of sampling
                return
            self.asked, self.waiting, self.call = self.waiting, [], Tries(asked, due=time.monotonic())
            self.call.begin(time.monotonic())

    def take(self) -> None:
        """Keep the result of the present call, if it is there."""
        if self.call is not None and self.call.result:
            self.keep(self.asked, self.call.result[0])
            self.asked, self.call = [], None

    def keep(self, groups: Sequence[RolloutGroup], results: Sequence[T]) -> None:
        """What was said of ``groups``. Raises :class:`RewardError` where that is not one result for each."""
        if len(results) != len(groups):
            raise RewardError(f"reward {self.name!r} gave judgements for {len(results)} groups, not {len(groups)}")
        self.known += zip(groups, results, strict=True)

    def rest(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Those of ``groups`` that no call was about."""
        known = {id(group) for group, _ in self.known}
        return [group for group in groups if id(group) not in known]

    def clear(self) -> None:
        """Forget this step; a call that is under way is given up."""
        if self.call is not None:
            self.call.give_up()
        self.waiting, self.asked, self.call, self.known = [], [], None, []


def collected(lines: Sequence[Ahead[T]], groups: Sequence[RolloutGroup]) -> list[list[T]]:
    """What each reward says of ``groups``: what is known or under way, and then, asked about together, the rest."""
    finished([line.call for line in lines if line.call is not None])
    for line in lines:
        line.take()
    left = [(line, line.rest(groups)) for line in lines]
    asked = [(line, rest) for line, rest in left if rest]
    found = finished([Tries(line.ask(rest), due=time.monotonic()) for line, rest in asked])
    for (line, rest), results in zip(asked, found, strict=True):
        line.keep(rest, results)
    tables = [{id(group): result for group, result in line.known} for line in lines]
    return [[table[id(group)] for group in groups] for table in tables]
