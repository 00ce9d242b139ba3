"""Bounds of a mean that hold for any values between 0 and 1."""

from __future__ import annotations

import math


def bernoulli_kl(p: float, q: float) -> float:
    """KL of two coins, nats.

        KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    >>> round(bernoulli_kl(0.5, 0.25), 4), bernoulli_kl(0.0, 0.0), bernoulli_kl(1.0, 0.0)
    (0.1438, 0.0, inf)
    """
    parts = ((p, q), (1 - p, 1 - q))
    if any(a > 0 and b <= 0 for a, b in parts):
        return math.inf
    return math.fsum(a * math.log(a / b) for a, b in parts if a > 0)


def mean_bounds(mean: float, n: int, *, alpha: float) -> tuple[float, float]:
    """Bounds of the expectation from the ``mean`` of ``n`` independent values in [0, 1]: each is wrong with a
    probability of at most ``alpha``.

        {p : n KL(mean || p) <= log(1 / alpha)}

    Source: Hoeffding 1963, theorem 1 (the Chernoff bound, which holds for values in [0, 1] as for coins). Where all
    values are 0, the upper bound is 1 - alpha^(1/n), which is exact.

    >>> mean_bounds(0.0, 0, alpha=0.05), [round(x, 3) for x in mean_bounds(0.0, 10, alpha=0.05)]
    ((0.0, 1.0), [0.0, 0.259])
    """
    if not n:
        return 0.0, 1.0
    allowed = math.log(1 / alpha) / n
    return _edge(mean, 0.0, allowed), _edge(mean, 1.0, allowed)


def _edge(mean: float, end: float, allowed: float) -> float:
    """The point between ``mean`` and ``end`` at which the KL reaches ``allowed``, by bisection; ``end`` where it does
    not."""
    if bernoulli_kl(mean, end) <= allowed:
        return end
    near, far = mean, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if bernoulli_kl(mean, middle) <= allowed else (near, middle)
    return far
