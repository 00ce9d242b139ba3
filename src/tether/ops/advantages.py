"""Advantages from rewards alone: how much better a completion is than the others of its prompt.

``rewards`` is [P, G]: G completions of each of P prompts. No gradient flows through these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
"""What divides centred rewards: the standard deviation of their group, of the whole batch, or nothing."""

ZERO_VARIANCE = 1e-6
"""A spread below this fraction of the rewards' magnitude is rounding error, not signal."""


def zero_variance(rewards: Tensor) -> Tensor:
    """Which groups have equal rewards only: std <= 1e-6 * max(1, max |r|). ``rewards`` [P, G]; the result [P] bool.

    Such a group carries no learning signal. The comparison is relative because the standard deviation of equal floats
    computed in float32 need not be 0, and dividing by that rounding error makes advantages enormous.
    """
    scale = rewards.abs().amax(-1).clamp(min=1.0)
    return rewards.std(-1, unbiased=False) <= ZERO_VARIANCE * scale


def centred(rewards: Tensor) -> Tensor:
    """r_i - mean of the group. ``rewards`` and the result [P, G]; exactly 0 in a zero-variance group."""
    difference = rewards - rewards.mean(-1, keepdim=True)
    return torch.where(zero_variance(rewards).unsqueeze(-1), torch.zeros_like(difference), difference)


def leave_one_out(rewards: Tensor) -> Tensor:
    """r_i - mean of the *other* members: RLOO (Ahmadian et al. 2024, arXiv 2402.14740). [P, G] -> [P, G], G >= 2.

    Equals G / (G - 1) times :func:`centred`.
    """
    group = rewards.size(-1)
    if group < 2:
        raise ValueError(f"leave-one-out needs at least 2 completions per prompt, got {group}")
    return centred(rewards) * (group / (group - 1))


def group_standardised(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(r_i - mean_group) / (std_group + eps), with the unbiased (Bessel) std of TRL. [P, G] -> [P, G], G >= 2.

    Source: Shao et al. 2024, arXiv 2402.03300. Dividing by each group's own std re-weights the prompts, so the optimum
    is not that of E[r] - beta KL; see :func:`centred` for the unscaled form.
    """
    if rewards.size(-1) < 2:
        raise ValueError(f"standardising a group needs at least 2 completions per prompt, got {rewards.size(-1)}")
    return centred(rewards) / (rewards.std(-1, keepdim=True) + eps)


def alone(x: Tensor) -> list[Tensor]:
    """The gather of a single rank."""
    return [x]


def reward_spread(
    rewards: Tensor, scale: Scale, *, eps: float = 1e-4, gather: Callable[[Tensor], list[Tensor]] = alone
) -> Tensor:
    """The standard deviation that divides the rewards of each group, [P]: its own, that of the batch, or 1.

    A group without one is given the root mean square of the others', over all ranks, or 1 where no group has one: it
    still has a KL to be charged, at the price that the other groups pay. ``rewards`` [P, G].
    """
    flat = zero_variance(rewards)
    match scale:
        case "none":
            return torch.ones_like(rewards[:, 0])
        case "batch":
            whole = torch.cat(gather(centred(rewards)))
            return (whole.std() + eps if whole.any() else torch.ones_like(whole[0, 0])).expand(len(rewards))
        case "group":
            own = rewards.std(-1)
            told = torch.cat(gather(own[~flat]))
            typical = told.square().mean().sqrt() if len(told) else torch.ones_like(own[0])
            return torch.where(flat, typical, own) + eps


def batch_standardised(
    rewards: Tensor, *, eps: float = 1e-4, gather: Callable[[Tensor], list[Tensor]] = alone
) -> Tensor:
    """(r_i - mean_group) / (std over the whole batch of the centred rewards + eps). [P, G] -> [P, G].

    ``gather`` returns the tensors of all ranks, which then count as one batch.
    """
    difference = centred(rewards)
    whole = torch.cat(gather(difference))
    if whole.numel() < 2:
        raise ValueError("standardising a batch needs at least 2 completions")
    return difference / (whole.std() + eps)
