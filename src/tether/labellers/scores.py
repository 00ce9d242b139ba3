"""Labellers that compare by a reward or ask a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tether.annotator import bradley_terry
from tether.labellers.labels import Label, Pair
from tether.rewards.combine import WeightedSum
from tether.rewards.judge import JudgeReward, compare
from tether.seeds import generator
from tether.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class GoldLabeller:
    """A :class:`tether.labellers.labels.Labeller` that prefers the higher total of ``score``.

    At ``temperature`` T > 0, in units of the reward, it prefers the first of two with probability
    sigmoid((r_first - r_second) / T): Bradley and Terry 1952. At 0 it prefers the higher, and equal ones tie. Then the
    preference is turned around with probability ``noise``. It skips pairs to one of which no reward applies.
    """

    name: str
    score: WeightedSum
    seed: int
    temperature: float = 0.0
    noise: float = 0.0

    def label(self, pairs: Sequence[Pair]) -> list[Label]:
        groups = self.score.score(
            [RolloutGroup(prompt=pair.prompt, completions=(pair.first, pair.second)) for pair in pairs]
        )
        return [
            self._label(number, *(score.total for score in group.scores), prompt=pair.prompt.text)
            for number, (group, pair) in enumerate(zip(groups, pairs, strict=True))
        ]

    def _label(self, number: int, first: float | None, second: float | None, *, prompt: str) -> Label:
        if first is None or second is None:
            return "skip"
        difference = first - second
        if self.temperature == 0 and difference == 0:
            return "tie"
        draws = torch.rand(2, generator=generator(self.seed, "labeller", number, prompt), dtype=torch.float64).tolist()
        better = difference > 0 if self.temperature == 0 else draws[0] < bradley_terry(difference / self.temperature)
        return "first" if better != (draws[1] < self.noise) else "second"


@dataclass(frozen=True, kw_only=True)
class JudgeLabeller:
    """A :class:`tether.labellers.labels.Labeller` that asks a judge in both orders; where the two verdicts disagree, it
    is a tie (:func:`tether.rewards.judge.compare`)."""

    name: str
    judge: JudgeReward

    def label(self, pairs: Sequence[Pair]) -> list[Label]:
        return list(compare(self.judge, [(pair.prompt, pair.first, pair.second) for pair in pairs]))
