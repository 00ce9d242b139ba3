"""What several monitors keep: the first values of a figure beside its latest; and how completions are read."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tether.types import StepResult

FIRST, LAST = 5, 5
"""Steps that stand for how the policy began, and steps that stand for how it is now."""
MOST_WORDS = 300
"""Words of a completion that are read."""
WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")
"""A word, a sign, or a character of a script that is written without spaces."""


@dataclass(kw_only=True)
class Trace:
    """A figure over the steps: its first :data:`FIRST` values and its last :data:`LAST` after those."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def take(self, value: float) -> None:
        if len(self.first) < FIRST:
            self.first.append(value)
        else:
            self.last = [*self.last, value][-LAST:]

    @property
    def full(self) -> bool:
        return len(self.last) == LAST

    @property
    def before(self) -> float:
        return statistics.fmean(self.first)

    @property
    def now(self) -> float:
        return statistics.fmean(self.last)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A completion as monitors read it."""

    prompt: str
    text: str
    length: int
    """Tokens that the policy emitted."""
    reward: float | None


def read(result: StepResult) -> list[list[Read]]:
    """The completions of a step, by prompt; none of episodes, in which the words of the environment repeat."""
    return [
        [
            Read(prompt=group.rollouts.prompt.text, text=one.text, length=sum(one.mask), reward=score.total)
            for one, score in zip(group.rollouts.completions, group.scores, strict=True)
        ]
        for group in result.groups
        if not any(one.turns for one in group.rollouts.completions)
    ]


def words(text: str) -> list[str]:
    """
    >>> words("Thank you, and thank You!")
    ['thank', 'you', ',', 'and', 'thank', 'you', '!']
    """
    return [match[0] for match, _ in zip(WORD.finditer(text.lower()), range(MOST_WORDS), strict=False)]


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation; 0 where one side does not vary.

    >>> round(correlation([(0.0, 0.0), (1.0, 2.0), (2.0, 1.0)]), 3), correlation([(1.0, 2.0)] * 3)
    (0.5, 0.0)
    """
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:
        return 0.0


def within_groups(groups: Sequence[Sequence[Read]]) -> list[tuple[float, float]]:
    """Reward and length of each completion, less the means of its group: what tells answers to one prompt apart."""
    pairs = []
    for group in groups:
        scored = [(one.reward, float(one.length)) for one in group if one.reward is not None]
        if len(scored) > 1:
            reward, length = (statistics.fmean(pair[i] for pair in scored) for i in (0, 1))
            pairs += [(a - reward, b - length) for a, b in scored]
    return pairs


def examples(groups: Sequence[Sequence[Read]], *, having: str = "", most: int = 3) -> tuple[str, ...]:
    """A few completions of different prompts, those with the highest reward first."""
    found = [
        max(fitting, key=lambda one: -1e300 if one.reward is None else one.reward)
        for group in groups
        if (fitting := [one for one in group if having in " ".join(words(one.text))])
    ]
    found.sort(key=lambda one: 1e300 if one.reward is None else -one.reward)
    return tuple(" ".join(one.text.split())[:200] for one in found[:most])
