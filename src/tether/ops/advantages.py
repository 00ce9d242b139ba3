"""Advantages from rewards alone: how much better a completion is than the others of its prompt.

``rewards`` is [P, G]: G completions of each of P prompts. No gradient flows through these functions.

``applies`` [P, G] is True where a completion has a reward; None means everywhere. A completion without one leaves the
mean and the standard deviation of its group, its entry of ``rewards`` may hold anything, and its advantage is 0. A
group with fewer than two rewards has nothing to compare: all of its advantages are 0.

An advantage (:func:`standardised`) is :func:`relative` / :func:`reward_spread`:

===================  ======  =======================================================================================
baseline             scale
===================  ======  =======================================================================================
mean                 group   GRPO (Shao et al. 2024, arXiv 2402.03300), with the unbiased (Bessel) std of TRL
mean                 none    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)
leave_one_out        none    RLOO (Ahmadian et al. 2024, arXiv 2402.14740)
mean                 batch   the baseline form of REINFORCE++ (Hu et al. 2025, arXiv 2501.03262)
batch                batch   REINFORCE++
===================  ======  =======================================================================================

Dividing by each group's own std re-weights the prompts, so the optimum is not that of E[r] - beta KL unless the KL is
divided by it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tether.ops.masked import masked_mean, masked_sum

Scale = Literal["group", "batch", "none"]
"""What divides centred rewards: the standard deviation of their group, of the whole batch, or nothing."""

Baseline = Literal["mean", "leave_one_out", "batch"]
"""What is subtracted from a reward: the mean of its group, of the others of its group, or of the whole batch."""

Gather = Callable[[Tensor], list[Tensor]]
"""Returns the tensors of all ranks, which then count as one batch."""

ZERO_VARIANCE = 1e-6
"""A spread below this fraction of the rewards' magnitude is rounding error, not signal."""


def alone(x: Tensor) -> list[Tensor]:
    """The gather of a single rank."""
    return [x]


def group_mean(rewards: Tensor, applies: Tensor | None = None) -> Tensor:
    """The mean of each group. [P, G] -> [P, 1]; 0 for a group without rewards."""
    if applies is None:
        return rewards.mean(-1, keepdim=True)
    return masked_mean(rewards, applies, -1).unsqueeze(-1)


def group_std(rewards: Tensor, applies: Tensor | None = None, *, unbiased: bool = True) -> Tensor:
    """The standard deviation of each group. [P, G] -> [P]; 0 for a group with fewer than two rewards."""
    if applies is None:
        return rewards.std(-1, unbiased=unbiased)
    squares = masked_sum((rewards - group_mean(rewards, applies)).square(), applies, -1)
    return (squares / (applies.sum(-1) - int(unbiased)).clamp(min=1)).sqrt()


def zero_variance(rewards: Tensor, applies: Tensor | None = None) -> Tensor:
    """Which groups have equal rewards only: std <= 1e-6 * max(1, max |r|). ``rewards`` [P, G]; the result [P] bool.

    Such a group carries no learning signal. The comparison is relative because the standard deviation of equal floats
    computed in float32 need not be 0, and dividing by that rounding error makes advantages enormous.
    """
    size = rewards.abs() if applies is None else torch.where(applies, rewards.abs(), torch.zeros_like(rewards))
    return group_std(rewards, applies, unbiased=False) <= ZERO_VARIANCE * size.amax(-1).clamp(min=1.0)


def centred(rewards: Tensor, applies: Tensor | None = None) -> Tensor:
    """r_i - mean of the group. ``rewards`` and the result [P, G]; exactly 0 in a zero-variance group."""
    difference = rewards - group_mean(rewards, applies)
    none = zero_variance(rewards, applies).unsqueeze(-1)
    return torch.where(none if applies is None else none | ~applies, torch.zeros_like(difference), difference)


def leave_one_out(rewards: Tensor, applies: Tensor | None = None) -> Tensor:
    """r_i - mean of the *other* members: RLOO (Ahmadian et al. 2024, arXiv 2402.14740). [P, G] -> [P, G], G >= 2.

    Equals n / (n - 1) times :func:`centred`, with n the rewards of the group.
    """
    group = rewards.size(-1)
    if group < 2:
        raise ValueError(f"leave-one-out needs at least 2 completions per prompt, got {group}")
    if applies is None:
        return centred(rewards) * (group / (group - 1))
    counts = applies.sum(-1, keepdim=True)
    return centred(rewards, applies) * (counts / (counts - 1).clamp(min=1))


def batch_centred(rewards: Tensor, applies: Tensor | None = None, *, gather: Gather = alone) -> Tensor:
    """r_i - mean of the whole batch: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262). [P, G] -> [P, G], G >= 1.

    Exactly 0 where all rewards of the batch are equal. Unlike the mean of a group, that of the batch does not know how
    hard a prompt is, so the variance is larger; the expected gradient is that of r for both.
    """
    whole = torch.cat(gather(rewards.flatten() if applies is None else rewards[applies]))
    difference = rewards - whole.mean()
    none = zero_variance(whole.unsqueeze(0)).expand_as(rewards) if len(whole) else torch.ones_like(rewards).bool()
    return torch.where(none if applies is None else none | ~applies, torch.zeros_like(difference), difference)


def relative(rewards: Tensor, baseline: Baseline, applies: Tensor | None = None, *, gather: Gather = alone) -> Tensor:
    """Rewards minus one of the baselines above, by name. [P, G] -> [P, G]."""
    match baseline:
        case "mean":
            return centred(rewards, applies)
        case "leave_one_out":
            return leave_one_out(rewards, applies)
        case "batch":
            return batch_centred(rewards, applies, gather=gather)


def standardised(
    rewards: Tensor,
    applies: Tensor | None = None,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    gather: Gather = alone,
) -> tuple[Tensor, Tensor]:
    """Advantages, [P, G], and what divided the rewards of each group, [P]; ``rewards`` [P, G]."""
    spread = reward_spread(rewards, scale, applies, baseline=baseline, gather=gather)
    return relative(rewards, baseline, applies, gather=gather) / spread.unsqueeze(1), spread


def reward_spread(
    rewards: Tensor,
    scale: Scale,
    applies: Tensor | None = None,
    *,
    baseline: Baseline = "mean",
    eps: float = 1e-4,
    gather: Gather = alone,
) -> Tensor:
    """What divides the rewards of each group, [P]: the standard deviation of its own, that of the batch about its
    ``baseline``, each plus ``eps``, or 1.

    A group without one is given the root mean square of the others', over all ranks, or 1 where no group has one: it
    still has a KL to be charged, at the price that the other groups pay. ``rewards`` [P, G].
    """
    flat = zero_variance(rewards, applies)
    match scale:
        case "none":
            return torch.ones_like(rewards[:, 0])
        case "batch":
            whole = _differences(rewards, baseline, applies, gather)
            return (whole.std() + eps if whole.any() else torch.ones_like(rewards[0, 0])).expand(len(rewards))
        case "group":
            own = group_std(rewards, applies)
            told = torch.cat(gather(own[~flat]))
            typical = told.square().mean().sqrt() if len(told) else torch.ones_like(own[0])
            return torch.where(flat, typical, own) + eps


def _differences(rewards: Tensor, baseline: Baseline, applies: Tensor | None, gather: Gather) -> Tensor:
    """Differences from the baseline of all ranks' completions that have a reward, [n]."""
    own = relative(rewards, baseline, applies, gather=gather)
    return torch.cat(gather(own.flatten() if applies is None else own[applies]))


def max_of_k(rewards: Tensor, k: int, applies: Tensor | None = None) -> Tensor:
    """What each completion adds to the best of k, in place of its reward: pass@k training. [P, G] -> [P, G], k < G.

    With M_i the mean over the subsets of k completions that hold i, and M_-i over those that do not, of the largest
    reward in the subset, the result is (n - 1) / n (M_i - M_-i), n the rewards of the group. M_-i does not depend on
    completion i, so E[(M_i - M_-i) grad log pi(y_i)] = grad E[max of k] / k without bias, for rewards of any kind; the
    factor is that of a mean over a group which holds i, so that :func:`centred` and :func:`leave_one_out` mean what
    they mean for rewards. ``k = 1`` gives the centred rewards. With rewards sorted from the smallest,

        M_i = (C(i - 1, k - 1) r_i + sum_{j > i} C(j - 2, k - 2) r_j) / C(n - 1, k - 1),

    and M_i - M_-i = n / (n - k) (M_i - mean of M).

    Sources: Walder and Karkhanis 2025, arXiv 2505.15201, for the estimator of any reward; for rewards of 0 and 1,
    M_i - mean of M is the analytic advantage of Chen et al. 2025, arXiv 2508.10751, before its division by the std.
    A group of at most k rewards has nothing to compare: all of its results are 0.
    """
    found = torch.zeros_like(rewards)
    for row, group in enumerate(rewards):
        own = torch.ones_like(group, dtype=torch.bool) if applies is None else applies[row]
        n = int(own.sum())
        if n > k:
            best = _mean_of_best(group[own], k)
            found[row, own] = (n - 1) / (n - k) * (best - best.mean())
    return found


def _mean_of_best(rewards: Tensor, k: int) -> Tensor:
    """M_i of :func:`max_of_k`, for the rewards of one group, [n]."""
    n = len(rewards)
    ordered, order = rewards.double().sort()
    own = torch.tensor([math.comb(i, k - 1) / math.comb(n - 1, k - 1) for i in range(n)], dtype=torch.float64)
    as_best = [math.comb(j - 1, k - 2) / math.comb(n - 1, k - 1) if j and k > 1 else 0.0 for j in range(n)]
    weighted = torch.tensor(as_best, dtype=torch.float64, device=rewards.device) * ordered
    above = weighted.flip(0).cumsum(0).flip(0) - weighted
    means = own.to(rewards.device) * ordered + above
    return torch.empty_like(means).scatter_(0, order, means).to(rewards.dtype)
