"""Metrics with their reduction: values measured on one rank, to be combined with those of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tether.types import Metrics
from tether.world import World


@dataclass(frozen=True)
class Mean:
    """A mean over ``count`` items."""

    value: float
    count: float

    @staticmethod
    def put_together(parts: Sequence[Mean]) -> float:
        count = sum(part.count for part in parts)
        return sum(part.value * part.count for part in parts) / count if count else 0.0


@dataclass(frozen=True)
class Std:
    """A standard deviation over ``count`` items with this ``mean``, with ``count`` in the denominator."""

    value: float
    mean: float
    count: float

    @staticmethod
    def put_together(parts: Sequence[Std]) -> float:
        """sqrt(sum_i n_i (sigma_i^2 + (mean_i - mean)^2) / sum_i n_i)."""
        mean = Mean.put_together([Mean(part.mean, part.count) for part in parts])
        return math.sqrt(
            Mean.put_together([Mean(part.value**2 + (part.mean - mean) ** 2, part.count) for part in parts])
        )


@dataclass(frozen=True)
class Sum:
    """A count or another value that adds up over ranks."""

    value: float

    @staticmethod
    def put_together(parts: Sequence[Sum]) -> float:
        return sum(part.value for part in parts)


@dataclass(frozen=True)
class Max:
    """A maximum, such as the seconds that all ranks wait for."""

    value: float

    @staticmethod
    def put_together(parts: Sequence[Max]) -> float:
        return max(part.value for part in parts)


@dataclass(frozen=True)
class Min:
    """A minimum."""

    value: float

    @staticmethod
    def put_together(parts: Sequence[Min]) -> float:
        return min(part.value for part in parts)


Figure = Mean | Std | Sum | Max | Min
Figures = dict[str, Figure]


def reduce(figures: Mapping[str, Figure], world: World) -> Metrics:
    """The metrics of all ranks together. A figure missing on a rank, such as the mean of a reward that applied to none
    of its completions, is reduced over the others."""
    ranks = world.gather(dict(figures))
    if len(ranks) == 1:
        return {name: figure.value for name, figure in ranks[0].items()}
    names = dict.fromkeys(name for rank in ranks for name in rank)
    metrics: Metrics = {}
    for name in names:
        parts = [rank[name] for rank in ranks if name in rank]
        metrics[name] = type(parts[0]).put_together(parts)  # type: ignore[arg-type]
    return metrics
