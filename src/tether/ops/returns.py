"""Returns and generalised advantage estimates over the tokens of completions.

All tensors are [B, T], padded on the right: row b's mask is True on its first n_b tokens and False after. The value at
t is V(s_t), read at the state *before* token t is emitted; after a row's last token the value is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1}, G after the last token = 0; 0 at padding.

    Shapes: ``rewards``, ``mask`` and the result [B, T].
    """
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, torch.zeros_like(running))
        returns[:, t] = running
    return returns


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    delta_t = r_t + gamma * V_{t+1} - V_t,  A_t = delta_t + gamma * lam * A_{t+1},  return_t = A_t + V_t,
    with V and A after a row's last token = 0. Returns belong to the unwhitened advantages.

    Shapes: ``rewards``, ``values``, ``mask`` [B, T]; gives ``(advantages, returns)``, both [B, T] and 0 at padding.
    """
    advantages = torch.zeros_like(rewards)
    zero = rewards.new_zeros(rewards.size(0))
    next_value, next_advantage = zero, zero
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, zero)
        next_value = torch.where(mask[:, t], values[:, t], zero)
        advantages[:, t] = next_advantage
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns
