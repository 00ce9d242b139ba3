"""What one would get by taking k of the n samples of a prompt: unbiased estimates that use all n.

Each is the mean over all C(n, k) subsets of k samples, exactly and without drawing any: it has the expectation of one
fresh set of k samples, and less variance than cutting the n samples into sets. Everything follows from one table,

    q[m] = C(m, k) / C(n, k),    m = 0..n,

the share of the subsets that lie within m given samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction

import torch
from torch import Tensor


def subsets_within(n: int, k: int) -> Tensor:
    """q [n + 1] float64: q[m] = C(m, k) / C(n, k), by q[m - 1] = q[m] (m - k) / m from q[n] = 1, so that nothing
    overflows. Raises :class:`ValueError` unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..n, and k is {k} and n is {n}")
    m = torch.arange(n, 0, -1, dtype=torch.float64)
    falling = ((m - k).clamp(min=0) / m).cumprod(0)
    return torch.cat([torch.ones(1, dtype=torch.float64), falling]).flip(0)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that at least one of k samples passes, from n samples of which ``passed`` do:

        1 - C(n - passed, k) / C(n, k)

    Source: Chen et al. 2021, arXiv 2107.03374. The plain 1 - (1 - passed / n)^k is biased downwards.
    """
    if not 0 <= passed <= n:
        raise ValueError(f"passed must lie in 0..n, and passed is {passed} and n is {n}")
    return 1.0 - float(subsets_within(n, k)[n - passed])


def selection_weights(scores: Tensor, k: int) -> Tensor:
    """The chance that each of n samples is the best of a random subset of k; samples of equal ``scores`` [n] share
    theirs. The result is [n] float64 and adds up to 1.

    With L_j samples below the score of j and E_j at it, itself included: (q[L_j + E_j] - q[L_j]) / E_j. Without ties
    the i-th lowest score has C(i - 1, k - 1) / C(n, k), the distribution of the largest order statistic.

    ``weights @ scores`` is the expected maximum of k samples, and ``weights @ others`` the mean of another figure of
    the sample that the scores choose, as when a reward model chooses and a judge looks.
    """
    q = subsets_within(len(scores), k)
    below = (scores.unsqueeze(0) < scores.unsqueeze(1)).sum(1)
    equal = (scores.unsqueeze(0) == scores.unsqueeze(1)).sum(1)
    return (q[below + equal] - q[below]) / equal


def majority_at_k(answers: Sequence[Hashable], right: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """The chance that the most frequent answer of k samples is right, for each k of ``ks``, from n samples with these
    ``answers`` [n], each ``right`` [n] or not.

    Answers that are equally frequent in a subset share it: with t of them, each counts 1 / t. An answer whose samples
    are not all judged alike counts by the share of them that is right.

    This is the mean over all C(n, k) subsets, by counting in whole numbers: for each number of votes that can win,
    :func:`winners` goes through the answers once.

    Source: Wang et al. 2022, arXiv 2203.11171, for the vote.
    """
    for k in ks:
        subsets_within(len(answers), k)  # which says what is wrong with k
    votes: dict[Hashable, list[bool]] = {}
    for answer, value in zip(answers, right, strict=True):
        votes.setdefault(answer, []).append(value)
    groups = [(len(values), Fraction(sum(values), len(values))) for values in votes.values()]
    credit = dict.fromkeys(ks, Fraction(0))
    for v in range(1, min(max(count for count, _ in groups), max(ks)) + 1):
        for (m, tied), (_, worth) in winners(groups, v, most=max(ks)).items():
            if m in credit and tied:
                credit[m] += Fraction(worth, tied * math.comb(len(answers), m))
    return [float(credit[k]) for k in ks]


def winners(
    groups: Sequence[tuple[int, Fraction]], v: int, *, most: int
) -> dict[tuple[int, int], tuple[int, int | Fraction]]:
    """Choices of at most ``most`` samples from groups of (samples, worth) in which no group has more than ``v``: by
    (samples chosen, groups that have exactly v), how many choices there are, and the sum over them of the worth of the
    groups that have v."""
    found: dict[tuple[int, int], tuple[int, int | Fraction]] = {(0, 0): (1, 0)}
    for count, fraction in groups:
        worth = int(fraction) if fraction.denominator == 1 else fraction  # whole numbers are much faster
        longer: dict[tuple[int, int], tuple[int, int | Fraction]] = {}
        for (m, tied), (ways, total) in found.items():
            for u in range(min(v, count, most - m) + 1):
                key, choices = (m + u, tied + (u == v)), math.comb(count, u)
                ways_before, total_before = longer.get(key, (0, 0))
                own = total + worth * ways if u == v else total
                longer[key] = ways_before + ways * choices, total_before + own * choices
        found = longer
    return found
