"""Surrogates of the policy's objective, per token: what a policy loss does with the importance ratio.

rho = exp(log_ratio), log_ratio = logp - old_logp, and A is the advantage. At rho = 1 each has the gradient
-A grad logp; they differ in how a ratio away from 1 is bounded. Where ``clipped`` is True, that bound is active.

====================  =========================================  =================================================
surrogate             loss                                       gradient, of a token whose ratio is too large
====================  =========================================  =================================================
clip                  max(-A rho, -A clip(rho))                  0 for A > 0; unbounded for A < 0 ...
clip with a dual one  ... rho at most c                          ... then 0 for A < 0 too
cispo                 -min(rho, 1 + clip_high) A logp            bounded by (1 + clip_high) |A|
sapo                  -(4 / tau) sigmoid(tau (rho - 1)) A        falls smoothly to 0
====================  =========================================  =================================================

Also here: the weights that correct for a sampler which does not compute the trainer's distribution.

Shapes: ``log_ratio``, ``logp`` and ``advantages`` of one shape, tokens [B, T] or sequences [B], and so is what is
returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tether.ops.masked import masked_sum

PolicyLoss = Literal["clip", "cispo", "sapo"]
Mismatch = Literal["off", "tis", "mis"]
Level = Literal["token", "sequence"]
"""Whether a quantity is per token or per completion."""


@dataclass(frozen=True)
class SurrogateTerms:
    """A surrogate before it is reduced."""

    loss: Tensor
    """Loss per token, with gradient."""
    ratio: Tensor
    """rho, without gradient."""
    clipped: Tensor
    """bool, where the bound on the ratio is active."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """More values per token by metric name, as those of :class:`tether.ops.losses.LossTerms`."""


def surrogate(
    kind: PolicyLoss,
    log_ratio: Tensor,
    logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None,
    sapo_tau_pos: float,
    sapo_tau_neg: float,
) -> SurrogateTerms:
    """One of the surrogates below, by name."""
    match kind:
        case "clip":
            loss, clipped = clipped_surrogate(
                log_ratio, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
            )
        case "cispo":
            loss, clipped = cispo(log_ratio, logp, advantages, clip_high=clip_high)
        case "sapo":
            loss, clipped = sapo(log_ratio, advantages, tau_pos=sapo_tau_pos, tau_neg=sapo_tau_neg)
    return SurrogateTerms(loss, log_ratio.detach().exp(), clipped)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, clip_dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)).

    PPO's loss (Schulman et al. 2017, arXiv 1707.06347); clip_high > clip_low is DAPO's clip-higher. ``clipped`` is True
    where the gradient is 0: A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low.

    ``clip_dual`` = c bounds rho itself, which for A < 0 bounds the loss by c |A| and its gradient: then A < 0 and
    rho > c is clipped too. For c >= 1 + clip_high this is dual-clip PPO, min(loss, -c A) for A < 0 (Ye et al. 2020,
    arXiv 1912.09729), and also the two-sided clip, max(-A min(rho, c), -A clip(rho)) (INTELLECT-2, arXiv 2505.07291,
    with c its delta): the two are one function, and nothing changes for A > 0.

    Returns ``(loss, clipped)``.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))
    if clip_dual is not None:
        clipped = clipped | ((advantages < 0) & (ratio > clip_dual))
        ratio = ratio.clamp(max=clip_dual)
    return torch.maximum(-advantages * ratio, -advantages * bounded), clipped


def cispo(log_ratio: Tensor, logp: Tensor, advantages: Tensor, *, clip_high: float) -> tuple[Tensor, Tensor]:
    """-min(rho, 1 + clip_high) A logp, with the weight min(rho, 1 + clip_high) held constant.

    The clip bounds a token's weight and drops no token's gradient (MiniMax-M1, arXiv 2506.13585, equations 4 and 5;
    its lower bound is left out there too). ``clipped`` is True where rho > 1 + clip_high.

    Returns ``(loss, clipped)``. The loss is no estimate of the objective: only its gradient means something.
    """
    ratio = log_ratio.detach().exp()
    return -ratio.clamp(max=1.0 + clip_high) * advantages * logp, ratio > 1.0 + clip_high


def sapo(log_ratio: Tensor, advantages: Tensor, *, tau_pos: float, tau_neg: float) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, with tau = ``tau_pos`` where A > 0 and ``tau_neg`` elsewhere.

    The gate's slope, 4 p (1 - p) with p = sigmoid(tau (rho - 1)), is 1 at rho = 1 and falls smoothly on both sides,
    faster with a higher tau (Gao et al. 2025, arXiv 2511.20347). Nothing is ever ``clipped``.

    Returns ``(loss, clipped)``.
    """
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1.0)) * 4.0 / tau
    return -gate * advantages, torch.zeros_like(advantages, dtype=torch.bool)


def mismatch_weights(
    log_weight: Tensor, mask: Tensor, *, kind: Literal["tis", "mis"], level: Level, cap: float
) -> tuple[Tensor, Tensor]:
    """Weights of the surrogate that make up for a sampler whose distribution is not quite the trainer's.

    With ``log_weight`` = old_logp - sampler_logp, the log of w = pi_old / pi_sampler per token, or of a whole
    completion: the sum over its tokens, one weight for all of them:

        tis  min(w, cap): truncated importance sampling
        mis  w where w <= cap, else 0: masked importance sampling

    Sources: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS per token);
    Liu and Li et al. 2025, "When Speed Kills Stability" (both per completion). A masked token still counts in the
    denominator of the loss, as in TRL's ``*_mask`` modes; verl takes it out.

    Shapes: all [B, T]; returns ``(weights, over)``, without gradient, ``over`` True where w > cap.
    """
    log_weight = log_weight.detach()
    if level == "sequence":
        log_weight = masked_sum(log_weight, mask, dim=1).unsqueeze(1).expand_as(log_weight)
    weight = log_weight.exp()
    over = weight > cap
    return torch.where(over, cap if kind == "tis" else 0.0, weight), over


def adapt_entropy_coef(entropy_coef: float, entropy: float, *, target: float, step: float) -> float:
    """entropy_coef + ``step`` where ``entropy`` is at most ``target``, else entropy_coef - ``step``, but not below 0.

    The controller of Skywork-OR1 (He et al. 2025, arXiv 2505.22312), in nats per token. There, the bonus also applies
    only where the last entropy was at most the target: :func:`entropy_price`.
    """
    return max(0.0, entropy_coef + (step if entropy <= target else -step))


def entropy_price(entropy_coef: float, entropy: float | None, *, target: float | None) -> float:
    """The coefficient that a step applies. With a ``target`` it is 0 where the last ``entropy`` was above that, and
    before any is known."""
    if target is None or (entropy is not None and entropy <= target):
        return entropy_coef
    return 0.0
