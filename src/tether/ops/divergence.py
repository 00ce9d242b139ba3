"""Divergences between the policy pi and the reference pi_ref.

``d`` is always the log-ratio ``logp - ref_logp`` of samples drawn from pi. An estimator has a *value* (what it
estimates) and, when it is added to a loss and differentiated, a *gradient*, and the two need not belong to the same
divergence. With s = grad log pi and samples from pi:

====================  ==============================  =======================================================
estimator             value                           gradient of its expectation as a loss (samples held fixed)
====================  ==============================  =======================================================
k1 = d                KL(pi || pi_ref), unbiased      E[s] = 0: no effect
k2 = d^2 / 2          biased, close for small d       E[d s] = grad KL(pi || pi_ref), the reverse KL
k3 = e^-d - 1 + d     KL(pi || pi_ref), unbiased      E[(1 - e^-d) s] = grad KL(pi_ref || pi), the forward KL
ratio * k3            KL(pi || pi_ref), unbiased      E[d s] = grad KL(pi || pi_ref) again, also off policy
====================  ==============================  =======================================================

Sources: Schulman, "Approximating KL divergence" (2020), for k1-k3; DeepSeek-V3.2 (2025) for the ratio correction.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "k3_corrected"]

MAX_EXPONENT = 10.0
"""Bound on exponents. Under samples of pi, P(pi_ref / pi > e^10) < e^-10 (Markov), so it rarely alters an estimate.
Where it does, the gradient is bounded but keeps its sign: the policy is still pulled towards the reference."""


def k1(d: Tensor) -> Tensor:
    """d: unbiased for KL(pi || pi_ref), high variance, may be negative."""
    return d


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: never negative, biased."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased for KL(pi || pi_ref), never negative. Float32; where -d is above :data:`MAX_EXPONENT`
    the exponential continues as its tangent, so that neither it nor its slope overflows and the slope keeps its sign.
    """
    d = d.float()
    tangent = math.exp(MAX_EXPONENT) * (-d - MAX_EXPONENT).relu()  # whose slope at 0 is 0: the exponential has its own
    return torch.expm1((-d).clamp(max=MAX_EXPONENT)) + tangent + d


def kl_penalty(estimator: KLEstimator, d: Tensor, log_ratio: Tensor) -> Tensor:
    """The KL term of a loss, elementwise; differentiate it through ``d`` and ``log_ratio``.

    ``d`` = logp - ref_logp and ``log_ratio`` = logp - old_logp have one shape: tokens [B, T], or completions [B] when
    both are summed over the tokens first. Only ``k3_corrected`` = exp(log_ratio) * k3(d) reads ``log_ratio``. It is
    computed as pi_ref / pi_old + exp(log_ratio) * (d - 1), which is equal: the first term does not depend on pi, so its
    bound leaves the gradient exp(log_ratio) * d exact.
    """
    match estimator:
        case "k1":
            return k1(d)
        case "k2":
            return k2(d)
        case "k3":
            return k3(d)
        case "k3_corrected":
            d, log_ratio = d.float(), log_ratio.float()
            constant = (log_ratio - d).detach().clamp(max=MAX_EXPONENT).exp()
            return constant + log_ratio.clamp(max=MAX_EXPONENT).exp() * (d - 1)


def kl_slope(estimator: KLEstimator, d: Tensor) -> Tensor:
    """c(d) such that the on-policy gradient of :func:`kl_penalty` is E[c(d) grad log pi]: the table above.

    ``d`` has any shape; the result has the same shape and no gradient.
    """
    d = d.detach()
    match estimator:
        case "k1":
            return torch.ones_like(d)
        case "k2" | "k3_corrected":
            return d
        case "k3":
            return -torch.expm1((-d.float()).clamp(max=MAX_EXPONENT))


def exact_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || pi_ref) = sum_v pi_v (log pi_v - log pi_ref_v), in nats.

    ``logp`` and ``ref_logp`` [..., V] are normalised log-probabilities; the result is [...]. Swap the arguments for the
    forward KL. Outcomes with pi_v = 0 contribute nothing.
    """
    terms = logp.exp() * (logp - ref_logp)
    return torch.where(logp == -torch.inf, torch.zeros_like(terms), terms).sum(-1)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: the upper bound of KL(best-of-n || pi_ref), tight when no two scores tie.

    Source: Beirami et al. 2024, arXiv 2401.01879; the formula itself is older (Stiennon et al. 2020, arXiv 2009.01325).
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def top_k_of_n_kl(k: int, n: int, *, rounds: int = 1) -> float:
    """KL(pi_R || pi_ref) in nats after R ``rounds`` of drawing uniformly among the k best of n samples, when no two
    scores tie and each round samples from what the round before selected.

    With v = the share of pi_ref that scores higher, selecting once has the density and the upper tail

        f(v) = (n / k) P(Bin(n - 1, v) < k),    G(v) = E[min(Bin(n, v), k)] / k,

    and R rounds have the density f(v) f(G(v)) ... f(G^(R-1)(v)). Its KL is the mean of the logarithm of that, over a
    uniform w = G^R(v) (midpoint rule, the inverse of G by bisection). ``k = 1`` is exactly :func:`best_of_n_kl` of n^R;
    ``k = n`` gives 0.
    """
    if not 1 <= k <= n:
        raise ValueError(f"top-k-of-n needs 1 <= k <= n, got k={k}, n={n}")
    if k == 1:
        return best_of_n_kl(n**rounds)
    if k == n:
        return 0.0
    tail = (torch.arange(KL_NODES, dtype=torch.float64) + 0.5) / KL_NODES
    total = torch.zeros(KL_NODES, dtype=torch.float64)
    for _ in range(rounds):
        tail = _share_above(tail, k, n)
        total += math.log(n / k) + _log_binomial_cdf(k - 1, n - 1, tail)
    return float(total.mean())


KL_NODES, BISECTIONS = 4000, 60


def _share_above(tail: Tensor, k: int, n: int) -> Tensor:
    """v with G(v) = ``tail``, by bisection between 0 and 1."""
    low, high = torch.zeros_like(tail), torch.ones_like(tail)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # E[min(Bin(n, v), k)] = k - sum_{j < k} P(Bin(n, v) <= j)
        below = sum((_log_binomial_cdf(j, n, middle).exp() for j in range(k)), torch.zeros_like(middle))
        over = (k - below) / k > tail
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def _log_binomial_cdf(most: int, n: int, p: Tensor) -> Tensor:
    """log P(Bin(n, p) <= ``most``), float64, elementwise."""
    terms = [
        math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * p.log() + (n - j) * torch.log1p(-p)
        for j in range(most + 1)
    ]
    return torch.stack(terms).logsumexp(0)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, samples: int, horizon: int) -> float:
    """The proportional controller of Ziegler et al. (2019, arXiv 1909.08593, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2); kl_coef <- kl_coef * (1 + e * samples / horizon), where ``kl`` is the step's
    mean KL in nats per completion, ``samples`` its number of completions, and ``horizon`` is in completions too.
    ``samples`` is capped at ``horizon``: beyond five times the horizon the factor could be negative.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(samples / horizon, 1.0))
