"""Losses, elementwise: one number a pair, a completion or a token.

How the elements become one number is :mod:`tether.ops.reduce`'s business, because the denominator of a loss belongs to
the whole optimiser step and not to the part at hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, centring: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2.

    P(w preferred to l) = sigmoid(r_w - r_l) (Bradley and Terry 1952; as a reward-model loss, Stiennon et al. 2020,
    arXiv 2009.01325). The loss does not see a constant added to all scores; the centring term (Eisenstein et al. 2023,
    arXiv 2312.09244) pins it near 0.

    Shapes: ``chosen``, ``rejected`` and ``margin`` [B] scores in any unit; the result is [B], float32.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) with rho = exp(log_ratio), log_ratio = logp - old_logp.

    PPO's loss (Schulman et al. 2017, arXiv 1707.06347); clip_high > clip_low is DAPO's clip-higher. Also says where the
    clip is active, that is, where the gradient is cut: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low.

    Shapes: ``log_ratio``, ``advantages`` of one shape, tokens [B, T] or sequences [B]; gives ``(loss, clipped)`` of
    that shape, ``clipped`` bool.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    clipped = ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))
    return loss, clipped


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """1/2 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2).

    Shapes: all [B, T]; gives ``(loss, clipped)``, ``clipped`` True where the clipped branch is the larger one.
    """
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    plain, limited = (values - returns).square(), (bounded - returns).square()
    return 0.5 * torch.maximum(plain, limited), limited > plain


def likelihood(logp: Tensor) -> Tensor:
    """-log p of each token: what maximum-likelihood training minimises. [B, T] -> [B, T], nats."""
    return -logp
