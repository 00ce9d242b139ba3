"""Advantages from rewards alone: how much better a completion is than the others of its prompt.

``rewards`` is [P, G]: G completions of each of P prompts. No gradient flows through these functions.

``applies`` [P, G] is True where a completion has a reward; None means everywhere. A completion without one leaves the
mean and the standard deviation of its group, its entry of ``rewards`` may hold anything, and its advantage is 0. A
group with fewer than two rewards has nothing to compare: all of its advantages are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tether.ops.masked import masked_mean, masked_sum

Scale = Literal["group", "batch", "none"]
"""What divides centred rewards: the standard deviation of their group, of the whole batch, or nothing."""

ZERO_VARIANCE = 1e-6
"""A spread below this fraction of the rewards' magnitude is rounding error, not signal."""


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


def group_standardised(rewards: Tensor, applies: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """(r_i - mean_group) / (std_group + eps), with the unbiased (Bessel) std of TRL. [P, G] -> [P, G], G >= 2.

    Source: Shao et al. 2024, arXiv 2402.03300. Dividing by each group's own std re-weights the prompts, so the optimum
    is not that of E[r] - beta KL; see :func:`centred` for the unscaled form.
    """
    if rewards.size(-1) < 2:
        raise ValueError(f"standardising a group needs at least 2 completions per prompt, got {rewards.size(-1)}")
    return centred(rewards, applies) / (group_std(rewards, applies).unsqueeze(-1) + eps)


def alone(x: Tensor) -> list[Tensor]:
    """The gather of a single rank."""
    return [x]


def reward_spread(
    rewards: Tensor,
    scale: Scale,
    applies: Tensor | None = None,
    *,
    eps: float = 1e-4,
    gather: Callable[[Tensor], list[Tensor]] = alone,
) -> Tensor:
    """The standard deviation that divides the rewards of each group, [P]: its own, that of the batch, or 1.

    A group without one is given the root mean square of the others', over all ranks, or 1 where no group has one: it
    still has a KL to be charged, at the price that the other groups pay. ``rewards`` [P, G].
    """
    flat = zero_variance(rewards, applies)
    match scale:
        case "none":
            return torch.ones_like(rewards[:, 0])
        case "batch":
            whole = _differences(rewards, applies, gather)
            return (whole.std() + eps if whole.any() else torch.ones_like(rewards[0, 0])).expand(len(rewards))
        case "group":
            own = group_std(rewards, applies)
            told = torch.cat(gather(own[~flat]))
            typical = told.square().mean().sqrt() if len(told) else torch.ones_like(own[0])
            return torch.where(flat, typical, own) + eps


def batch_standardised(
    rewards: Tensor,
    applies: Tensor | None = None,
    *,
    eps: float = 1e-4,
    gather: Callable[[Tensor], list[Tensor]] = alone,
) -> Tensor:
    """(r_i - mean_group) / (std over the whole batch of the centred rewards + eps). [P, G] -> [P, G].

    ``gather`` returns the tensors of all ranks, which then count as one batch.
    """
    whole = _differences(rewards, applies, gather)
    if whole.numel() < 2:
        if applies is None:
            raise ValueError("standardising a batch needs at least 2 completions")
        return torch.zeros_like(rewards)
    return centred(rewards, applies) / (whole.std() + eps)


def _differences(rewards: Tensor, applies: Tensor | None, gather: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """The centred rewards of all ranks' completions that have one, [n]."""
    own = centred(rewards, applies)
    return torch.cat(gather(own.flatten() if applies is None else own[applies]))
