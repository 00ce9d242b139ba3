"""How a reward depends on the distance from the reference: two curves of over-optimisation, fitted by least squares.

    d = sqrt(KL(pi || pi_ref))
    best of n:               R(d) = c + d (a - b d)
    reinforcement learning:  R(d) = c + d (a - b log d)

c is the reward of the reference, a how fast the reward rises at first, and b how fast the gain is used up; with b > 0
the curve has a peak. Source: Gao, Schulman and Hilton 2022, arXiv 2210.10760, who have c = 0 because they subtract it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Curve = Literal["best-of-n", "rl"]


@dataclass(frozen=True)
class Fit:
    """A fitted curve."""

    curve: Curve
    c: float
    a: float
    b: float
    covariance: Tensor
    """[3, 3] float64, of (c, a, b)."""
    points: int

    def at(self, d: float) -> float:
        """The curve at a distance."""
        return self.c + self.a * d - self.b * _last(self.curve, torch.tensor(d, dtype=torch.float64)).item()

    def standard_error(self, d: float) -> float:
        """Of the curve at a distance."""
        row = design(self.curve, torch.tensor([d], dtype=torch.float64))[0]
        return math.sqrt(max(0.0, float(row @ self.covariance @ row)))

    @property
    def peak(self) -> float | None:
        """The distance at which the curve is highest; None where it has no peak (b <= 0, or a <= 0 for best of n)."""
        return peak_of(self.curve, self.a, self.b)


def design(curve: Curve, d: Tensor) -> Tensor:
    """[N, 3] float64: the factors of c, a and b at the distances ``d`` [N]."""
    return torch.stack([torch.ones_like(d), d, -_last(curve, d)], dim=1).double()


def _last(curve: Curve, d: Tensor) -> Tensor:
    """d^2, or d log d, which is 0 at 0."""
    return d * d if curve == "best-of-n" else torch.xlogy(d, d)


def peak_of(curve: Curve, a: float, b: float) -> float | None:
    """a / (2 b) for best of n, exp(a / b - 1) for reinforcement learning, where the derivative is 0."""
    if b <= 0:
        return None
    if curve == "best-of-n":
        return a / (2 * b) if a > 0 else None
    return math.exp(a / b - 1) if a / b < 700 else None


def fit_curve(curve: Curve, d: Tensor, reward: Tensor, variance: Tensor) -> Fit:
    """Weighted least squares of ``reward`` [N] at ``d`` [N], each with its ``variance`` [N] > 0.

        (c, a, b) = (X' W X)^-1 X' W R,   W = diag(1 / variance)

    The covariance is (X' W X)^-1, times the mean squared residual in standard deviations where that is above 1: points
    that scatter more than they should make it wider. Raises :class:`ValueError` for fewer than 5 points or 3 distances.
    """
    if len(d) < 5 or len(d.unique()) < 3:
        raise ValueError("a fit needs 5 points and 3 distances")
    x, weights = design(curve, d.double()), 1 / variance.double()
    inverse = torch.linalg.inv(x.T @ (weights.unsqueeze(1) * x))
    solution = inverse @ (x.T @ (weights * reward.double()))
    residual = reward.double() - x @ solution
    scatter = float((weights * residual.square()).sum()) / (len(d) - 3)
    c, a, b = solution.tolist()
    return Fit(curve=curve, c=c, a=a, b=b, covariance=inverse * max(1.0, scatter), points=len(d))


def peak_interval(fit: Fit, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> tuple[float, float] | None:
    """The interval of the peak: the quantiles of the peaks of curves drawn from the normal distribution of (a, b). A
    curve without a peak counts as one whose peak is infinitely far. None where more than half have none."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(fit.covariance + 1e-12 * torch.eye(3, dtype=torch.float64))
    noise = torch.randn(draws, 3, dtype=torch.float64, generator=generator) @ root.T
    peaks = [
        math.inf if (peak := peak_of(fit.curve, fit.a + da, fit.b + db)) is None else peak
        for _, da, db in noise.tolist()
    ]
    peaks.sort()
    if math.isinf(peaks[draws // 2]):
        return None
    tail = (1 - level) / 2
    return peaks[int(tail * draws)], peaks[min(draws - 1, int((1 - tail) * draws))]


def best_of_n_kl_of(scores: Tensor, n: int) -> float:
    """KL(best of n || one) in nats, of a policy whose completions have ``scores`` [M], some of which may tie.

    With F the share of scores up to a value, the best of n is below it with probability F^n. A score that occurs once
    stands for a continuous stretch of scores, from F_0 to F, and one that occurs more often for that value alone:

        stretch: int_{F_0}^{F} n u^(n-1) log(n u^(n-1)) du = [v log n + (n - 1) / n (v log v - v)] from F_0^n to F^n
        value:   P log(P / p),   P = F^n - F_0^n,  p = F - F_0

    Without ties the sum is log n - (n - 1) / n; each tie makes it smaller, because what is tied is not chosen among.
    """
    _, counts = scores.double().unique(return_counts=True)
    upper = counts.cumsum(0).double() / len(scores)
    lower = upper - counts.double() / len(scores)
    share = upper**n - lower**n
    value = torch.xlogy(share, share) - torch.xlogy(share, upper - lower)
    stretch = _integral(upper**n, n) - _integral(lower**n, n)
    return float(torch.where(counts > 1, value, stretch).sum())


def _integral(v: Tensor, n: int) -> Tensor:
    return v * math.log(n) + (n - 1) / n * (torch.xlogy(v, v) - v)
