"""Returns and generalised advantage estimates over the tokens of completions.

All tensors are [B, T]. The mask is True where the policy emitted the token. The value at t is V(s_t), read at the state
*before* token t is emitted; after a row's last emitted token the value is 0.

Positions where the mask is False, padding or an environment's tokens between two turns, are skipped: the value and the
advantage of the next emitted token are carried through, undiscounted, and the result is 0 there. Rewards belong on
emitted tokens; others are not read.

``gamma`` is one number, the discount between any emitted token and the next, or one per token, [B, T]
(:func:`turn_discounts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def turn_discounts(stops: Sequence[Sequence[int]], mask: Tensor, *, gamma: float) -> Tensor:
    """Discounts that count turns: ``gamma`` between the last token of a turn and the first of the next, 1 within one.

    ``stops`` has, of each row, the index after the last token of each turn. Shapes: ``mask`` and the result [B, T].
    """
    gammas = torch.ones(mask.shape, device=mask.device)
    for row, ends in enumerate(stops):
        gammas[row, [end - 1 for end in ends]] = gamma
    return gammas


def _at(gamma: float | Tensor, t: int) -> float | Tensor:
    return gamma[:, t] if isinstance(gamma, Tensor) else gamma


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float | Tensor) -> Tensor:
    """G_t = r_t + gamma_t * G_t', with t' the next emitted token, and G after the last one = 0; 0 where not emitted.

    Shapes: ``rewards``, ``mask`` and the result [B, T].
    """
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        running = torch.where(mask[:, t], rewards[:, t] + _at(gamma, t) * running, running)
        returns[:, t] = torch.where(mask[:, t], running, torch.zeros_like(running))
    return returns


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float | Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma_t * V_t' - V_t,  A_t = delta_t + gamma_t * lam * A_t',  return_t = A_t + V_t,
    with t' the next emitted token, and V and A after a row's last one = 0. Returns belong to the unwhitened advantages.

    Shapes: ``rewards``, ``values``, ``mask`` [B, T]; returns ``(advantages, returns)``, both [B, T] and 0 where the
    policy did not emit the token.
    """
    advantages = torch.zeros_like(rewards)
    zero = rewards.new_zeros(rewards.size(0))
    next_value, next_advantage = zero, zero
    for t in reversed(range(rewards.size(1))):
        emitted = mask[:, t]
        delta = rewards[:, t] + _at(gamma, t) * next_value - values[:, t]
        next_advantage = torch.where(emitted, delta + _at(gamma, t) * lam * next_advantage, next_advantage)
        next_value = torch.where(emitted, values[:, t], next_value)
        advantages[:, t] = torch.where(emitted, next_advantage, zero)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns
