"""Where a reward model is right: by length, by a column, and beside another one on the same pairs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.algorithms.pair_evaluation import accuracy_interval, sign_share
from tether.statistics import LEVEL, Estimate, bootstrap


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the pairs."""

    name: str
    pairs: int
    accuracy: float
    """Share of them whose chosen side scores higher; a tie counts half."""
    low: float
    high: float
    """The 95% interval (:func:`tether.algorithms.pair_evaluation.accuracy_interval`)."""


def part(name: str, right: Sequence[float], prompts: Sequence[Hashable], where: Sequence[int]) -> Part:
    """The pairs at the indices ``where``, of all that are ``right`` [N] and of ``prompts`` [N]."""
    own = [right[i] for i in where]
    low, high = accuracy_interval(own, [prompts[i] for i in where])
    return Part(name=name, pairs=len(own), accuracy=math.fsum(own) / len(own), low=low, high=high)


def length_bins(longer_by: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The indices of pairs by how much ``longer_by`` [N] the chosen side is, in tokens: at most five bins, those far
    from 0 beginning at the median difference. Empty ones are left out."""
    far = sorted(abs(d) for d in longer_by if d) or [1]
    median = far[len(far) // 2]
    bins: dict[str, list[int]] = {
        f"shorter by {median} or more": [],
        f"shorter by less than {median}": [],
        "as long": [],
        f"longer by less than {median}": [],
        f"longer by {median} or more": [],
    }
    names = list(bins)
    for i, d in enumerate(longer_by):
        place = 2 + ((d > 0) - (d < 0)) * (2 if abs(d) >= median else 1)
        bins[names[place]].append(i)
    return [(name, inside) for name, inside in bins.items() if inside]


def length_sides(longer_by: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The indices of the pairs whose chosen side is ``shorter``, and of those where it is ``longer``, if any."""
    found = [
        ("shorter", [i for i, d in enumerate(longer_by) if d < 0]),
        ("longer", [i for i, d in enumerate(longer_by) if d > 0]),
    ]
    return [(name, inside) for name, inside in found if inside]


def value_groups(values: Sequence[object]) -> list[tuple[str, list[int]]]:
    """The indices of pairs by the text of their value in a column, in the order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(str(value), []).append(i)
    return list(found.items())


def places_of(prompts: Sequence[Hashable]) -> Tensor:
    """The number [N] of each prompt, in the order of first appearance."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(prompt, len(known)) for prompt in prompts])


def standardised(values: Tensor) -> Tensor:
    """With mean 0 and variance 1, so that sums of squares lose no digits; 0 where all are the same."""
    if values.min() == values.max():
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std()


def length_correlation(scores: Tensor, lengths: Tensor, prompts: Sequence[Hashable], *, seed: int) -> Estimate:
    """Pearson's correlation of ``scores`` [2, N] with ``lengths`` [2, N] in tokens, over both sides of all pairs, with
    a bootstrap interval over ``prompts`` [N]. NaN where all lengths or all scores are the same.

    It mixes what a longer text is worth with what longer answers' prompts are like; :func:`length_correlation_in_pairs`
    does not.
    """
    x, y, place = standardised(scores.double()), standardised(lengths.double()), places_of(prompts)

    def correlation(counts: Tensor) -> Tensor:
        w = counts[:, place]
        total = 2 * w.sum(1)

        def mean(values: Tensor) -> Tensor:
            return (w @ values.sum(0)) / total

        return (mean(x * y) - mean(x) * mean(y)) / (
            (mean(x * x) - mean(x).square()) * (mean(y * y) - mean(y).square())
        ).sqrt()

    return bootstrap(correlation, int(place.max()) + 1, seed=seed, width=len(place))


def length_correlation_in_pairs(scores: Tensor, lengths: Tensor, prompts: Sequence[Hashable], *, seed: int) -> Estimate:
    """The same after taking the mean of each pair from its two scores and its two lengths: with the differences d and l
    between the sides of a pair, sum d l / sqrt(sum d^2 sum l^2), whichever side comes first."""
    d, longer, place = (scores[0] - scores[1]).double(), (lengths[0] - lengths[1]).double(), places_of(prompts)

    def correlation(counts: Tensor) -> Tensor:
        w = counts[:, place]
        return (w @ (d * longer)) / ((w @ d.square()) * (w @ longer.square())).sqrt()

    return bootstrap(correlation, int(place.max()) + 1, seed=seed, width=len(place))


def accuracy_difference(
    own: Tensor, rival: Tensor, prompts: Sequence[Hashable], *, seed: int, level: float = LEVEL
) -> Estimate:
    """By how much the accuracy of a model with score differences ``own`` [N] is higher than that of one with ``rival``
    [N] on the same pairs, with a bootstrap interval over ``prompts`` [N]: all pairs of a prompt, and both models on
    each, are drawn together."""
    gain, place = sign_share(own) - sign_share(rival), places_of(prompts)

    def difference(counts: Tensor) -> Tensor:
        w = counts[:, place]
        return (w @ gain) / w.sum(1)

    return bootstrap(difference, int(place.max()) + 1, seed=seed, level=level, width=len(place))
