"""Intervals of means, differences and win rates over held-out prompts, and what it would take to tell two apart.

The unit is the prompt: completions of one prompt are alike, so that a second one says less than a second prompt.
Completions are averaged within their prompt first, every prompt weighs the same, and the spread that an interval is
made of is the one between prompts. With m_i the figure of prompt i of P, the interval of their mean is

    mean(m) +- t * std(m) / sqrt(P),    t the quantile of Student's t with P - 1 degrees of freedom.

It holds exactly for normal m_i, whatever P, and otherwise the better the more prompts there are. Figures that are not
such means have bootstrap intervals (:func:`bootstrap`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.seeds import generator

LEVEL = 0.95
"""Coverage of the intervals."""
POWER = 0.8
"""Chance of telling two apart that :func:`prompts_needed` asks for."""
MOST = 10**7
"""Prompts beyond which :func:`prompts_needed` gives up."""
RESAMPLES = 4000
"""Sets of prompts that a bootstrap draws."""
AT_ONCE = 2**20
"""Numbers in the resamples that are handled at once."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts, with its interval."""

    value: float
    low: float
    high: float
    """-inf and inf where one prompt leaves no interval."""
    prompts: int
    std: float
    """Standard deviation between prompts, with P - 1; 0 for one prompt. Of a bootstrap: sqrt(P) times its standard
    error."""

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside of the interval."""
        return not self.low <= value <= self.high


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with ``df`` degrees of freedom, by the finite series for whole numbers.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if df % 2 else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if df % 2 else sine * total
    return 0.5 + inside / 2


def normal_cdf(x: float) -> float:
    """P(X <= x) of a standard normal X."""
    return math.erfc(-x / math.sqrt(2)) / 2


def normal_quantile(p: float) -> float:
    """x with P(X <= x) = ``p`` for a standard normal X."""
    return math.sqrt(2) * _root(math.erf, 2 * p - 1)


@functools.cache
def t_quantile(p: float, df: int) -> float:
    """t with P(T <= t) = ``p``, in (0, 1), for Student's t with ``df`` degrees of freedom."""
    return _root(lambda t: t_cdf(t, df), p)


def _root(rising: Callable[[float], float], value: float) -> float:
    """Where a rising function has this ``value``, by bisection."""
    low, high = -1.0, 1.0
    while rising(low) > value:
        low *= 2
    while rising(high) < value:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return middle


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """The mean of one figure per prompt. Raises :class:`ValueError` without any."""
    if not values:
        raise ValueError("no prompt has a figure")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(value=mean, low=-math.inf, high=math.inf, prompts=1, std=0.0)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile((1 + level) / 2, count - 1) * std / math.sqrt(count)
    return Estimate(value=mean, low=mean - half, high=mean + half, prompts=count, std=std)


def share_interval(shares: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """The mean of one share in [0, 1] per prompt, such as a win rate: Wilson's interval, with the number of independent
    comparisons that would have the variance seen between prompts, p (1 - p) / n = std^2 / P, in the place of n, and the
    quantile of Student's t in that of the normal. It stays within [0, 1] and is wide near the ends. Where all prompts
    have one share, each counts as one comparison.

    Source: Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", 1998; Wilson 1927.
    """
    plain = mean_interval(shares, level=level)
    if plain.prompts == 1:
        return Estimate(value=plain.value, low=0.0, high=1.0, prompts=1, std=0.0)
    p, variance = plain.value, plain.std**2 / plain.prompts
    count = p * (1 - p) / variance if variance > 0 else plain.prompts
    t = t_quantile((1 + level) / 2, plain.prompts - 1)
    scale = 1 + t**2 / count
    middle = (p + t**2 / (2 * count)) / scale
    half = t * math.sqrt(p * (1 - p) / count + t**2 / (4 * count**2)) / scale
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value=p, low=low, high=high, prompts=plain.prompts, std=plain.std)


def bootstrap(
    statistic: Callable[[Tensor], Tensor], prompts: int, *, seed: int, level: float = LEVEL, width: int = 0
) -> Estimate:
    """A figure of ``prompts`` with its bootstrap interval, for all of the completions of a prompt at once.

    ``statistic`` gives the figure [R] for each row of counts [R, P] float64, which say how often each prompt is among
    P drawn with replacement; with ones it is the figure itself. Whatever it holds of a prompt is drawn together, so
    that a difference of two policies on the same prompts is a paired one. ``width`` is how many numbers it handles per
    row, if more than P; it bounds the memory.

    The ends are quantiles of the figure over :data:`RESAMPLES` draws, the same ones for the same ``seed`` and P. The
    quantiles are not (1 -+ level) / 2 but those that give the mean of normal figures its interval by Student's t,

        Phi(-+ t sqrt(P / (P - 1))),    t the quantile with P - 1 degrees of freedom,

    because the plain ones are too narrow for few prompts (Hesterberg 2014, arXiv 1411.5279: the expanded percentile
    interval). Where all prompts have one figure the interval has no width, which says nothing about other prompts.
    """
    value = float(statistic(torch.ones(1, prompts, dtype=torch.float64)))
    if prompts == 1:
        return Estimate(value=value, low=-math.inf, high=math.inf, prompts=1, std=0.0)
    draws, found = generator(seed, "bootstrap"), []
    rows = max(1, AT_ONCE // max(prompts, width))
    for first in range(0, RESAMPLES, rows):
        drawn = torch.randint(prompts, (min(rows, RESAMPLES - first), prompts), generator=draws)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        found.append(statistic(counts.scatter_add_(1, drawn, torch.ones_like(counts))))
    figures, wider = torch.cat(found), math.sqrt(prompts / (prompts - 1))
    tail = normal_cdf(-wider * t_quantile((1 + level) / 2, prompts - 1))
    low, high = figures.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    std = wider * math.sqrt(prompts) * float(figures.std())
    return Estimate(value=value, low=low, high=high, prompts=prompts, std=std)


def bootstrap_mean(values: Sequence[float], *, seed: int, level: float = LEVEL) -> Estimate:
    """:func:`bootstrap` of the mean of one figure per prompt."""
    figures = torch.tensor(values, dtype=torch.float64)
    return bootstrap(lambda counts: counts @ figures / len(figures), len(figures), seed=seed, level=level)


def simultaneous(level: float, comparisons: int) -> float:
    """The level of each of several intervals that hold together with ``level`` at least (Bonferroni)."""
    return 1 - (1 - level) / max(1, comparisons)


def prompts_needed(difference: Estimate, *, level: float = LEVEL) -> int | None:
    """How many prompts would tell a difference from 0, if it and its spread between prompts are really as estimated:
    the smallest P with (t + z) * std / sqrt(P) <= |difference|, t the quantile of the interval and z that of
    :data:`POWER`. None where even :data:`MOST` would not, or the spread is not known."""
    if difference.prompts < 2 or difference.value == 0:
        return None
    ratio = difference.std / abs(difference.value)
    z, p = normal_quantile(POWER), (1 + level) / 2
    count = max(2, math.ceil(((normal_quantile(p) + z) * ratio) ** 2))  # the normal quantile is the smaller one
    if count > MOST:
        return None
    while count < 1000 and (t_quantile(p, count - 1) + z) * ratio > math.sqrt(count):
        count += 1  # from 1000 prompts on, the two quantiles differ by a thousandth
    return count


def known(figures: Iterable[float | None]) -> list[float]:
    """The figures that are there, of prompts or of completions."""
    return [figure for figure in figures if figure is not None]


def mean_score(scores: Sequence[float | None]) -> float | None:
    """The mean over the completions of one prompt that have a score; None without any."""
    there = known(scores)
    return math.fsum(there) / len(there) if there else None


def mean_difference(own: Sequence[float | None], rival: Sequence[float | None]) -> float | None:
    """:func:`mean_score` of ``own`` minus that of ``rival`` for one prompt; None where either has none."""
    mine, theirs = mean_score(own), mean_score(rival)
    return None if mine is None or theirs is None else mine - theirs


def win_share(own: Sequence[float | None], rival: Sequence[float | None], *, same_seeds: bool) -> float | None:
    """Share of comparisons within one prompt that ``own`` wins, ties half; None without a comparison.

    Completions that were sampled with the same seeds are compared one by one, in their order, and others each with
    each. A completion without a score is in no comparison.
    """
    pairs = zip(own, rival, strict=True) if same_seeds else ((a, b) for a in own for b in rival)
    wins = [0.5 if a == b else float(a > b) for a, b in pairs if a is not None and b is not None]
    return math.fsum(wins) / len(wins) if wins else None
