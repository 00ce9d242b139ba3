"""Several rewards as one scorer: weighted, added up, and each reported on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tether.errors import RewardError
from tether.types import RolloutGroup, Score, ScoredGroup

RewardValue = float | tuple[float, ...] | None
"""What one reward says of one completion: a number, a number for each token, or None where it does not apply."""


class Reward(Protocol):
    """One source of reward."""

    @property
    def name(self) -> str: ...

    def values(self, groups: Sequence[RolloutGroup]) -> list[list[RewardValue]]:
        """A value for each completion of each group. Raises :class:`RewardError` when it cannot say."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """A :class:`tether.types.Scorer`: total = sum over rewards of weight * value, leaving out those that do not apply.

    Token rewards of several parts add up token by token; a part with one number then counts on the last token.
    """

    rewards: tuple[tuple[Reward, float], ...]

    def __post_init__(self) -> None:
        names = [reward.name for reward, _ in self.rewards]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise RewardError(f"two rewards are named {sorted(repeated)[0]!r}; each is reported by name, so rename one")
        if not names:
            raise RewardError("no reward given; add --reward")

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        by_reward = [reward.values(groups) for reward, _ in self.rewards]
        return [
            ScoredGroup(
                rollouts=group,
                scores=tuple(
                    self._total([values[i][j] for values in by_reward], len(completion.ids), group.prompt.text)
                    for j, completion in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]

    def _total(self, values: Sequence[RewardValue], tokens: int, prompt: str) -> Score:
        parts: dict[str, float | None] = {}
        per_token = [0.0] * tokens
        dense = False
        for (reward, weight), value in zip(self.rewards, values, strict=True):
            if value is None:
                parts[reward.name] = None
                continue
            if isinstance(value, tuple):
                dense = True
                parts[reward.name] = sum(value)
                per_token = [a + weight * b for a, b in zip(per_token, value, strict=True)]
            else:
                parts[reward.name] = value
                per_token[-1] += weight * value
        if all(part is None for part in parts.values()):
            raise RewardError(f"no reward applies to a completion of the prompt {prompt[:60]!r}: all gave None")
        try:
            total = math.fsum(per_token)
        except (OverflowError, ValueError):  # finite numbers with an infinite sum, and infinities of either sign
            total = math.inf
        if not math.isfinite(total):
            raise RewardError(
                f"the rewards of a completion of the prompt {prompt[:60]!r} add up to more than a float can hold"
            )
        return Score(total=total, parts=parts, token_rewards=tuple(per_token) if dense else None)
