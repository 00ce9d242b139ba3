"""Losses, elementwise: one number per pair, completion or token.

:mod:`tether.ops.reduce` reduces the elements to one number, because the denominator of a loss belongs to the whole
optimizer step and not to a part of it.

A policy loss is a value: :class:`LossInputs` in, :class:`LossTerms` out. :mod:`tether.ops.surrogates` has what it does
with the importance ratio; :func:`ppo_loss` and :func:`grpo_loss` add to that what else their algorithm minimises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tether.ops.divergence import KLEstimator, kl_penalty
from tether.ops.masked import masked_sum
from tether.ops.surrogates import Level, SurrogateTerms


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, centring: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2.

    P(w preferred to l) = sigmoid(r_w - r_l) (Bradley and Terry 1952; as a reward-model loss, Stiennon et al. 2020,
    arXiv 2009.01325). The loss does not depend on a constant added to all scores; the centring term (Eisenstein et al.
    2023, arXiv 2312.09244) keeps it near 0.

    Shapes: ``chosen``, ``rejected`` and ``margin`` [B] scores in any unit; the result is [B], float32.
    """
    chosen, rejected = chosen.float(), rejected.float()
    return -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]


def preference_loss(
    log_ratio: Tensor,
    margin: Tensor | float = 0.0,
    *,
    beta: float,
    kind: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of DPO and of its kin, of the difference between two log-ratios to the reference.

    With ``log_ratio`` d = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) and h = beta d - margin:

        sigmoid  -(1 - e) log sigmoid(h) - e log sigmoid(-h), e = ``label_smoothing``
                 (Rafailov et al. 2023, arXiv 2305.18290; smoothed, Mitchell 2023; margin, Amini et al. 2024,
                 arXiv 2402.10571)
        ipo      (h / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036)
        hinge    max(0, 1 - h) (Zhao et al. 2023, arXiv 2305.10425)

    Shapes: ``log_ratio`` and ``margin`` [B], nats and units of the reward; the result is [B], float32.
    """
    h = beta * log_ratio.float() - margin
    match kind:
        case "sigmoid":
            return -(1.0 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
        case "ipo":
            return (h / beta - 1.0 / (2.0 * beta)).square()
        case "hinge":
            return F.relu(1.0 - h)


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """1/2 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2).

    Shapes: all [B, T]; returns ``(loss, clipped)``, ``clipped`` True where the clipped branch is the larger one.
    """
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    plain, limited = (values - returns).square(), (bounded - returns).square()
    return 0.5 * torch.maximum(plain, limited), limited > plain


def negative_log_likelihood(logp: Tensor) -> Tensor:
    """-log p of each token: what maximum-likelihood training minimises. [B, T] -> [B, T], nats."""
    return -logp


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The inputs of a policy loss, all [B, T]. Values are arbitrary where ``mask`` is False.

    ``logp`` and ``entropy`` have gradient. The log-probs are of the emitted tokens under softmax(logits / T), T the
    sampling temperature.
    """

    logp: Tensor
    """Log-probs under the current policy."""
    old_logp: Tensor
    """Log-probs under the policy at the start of the update."""
    sampler_logp: Tensor
    """Log-probs that the sampler drew with: ``old_logp`` again, unless that is the trainer's."""
    ref_logp: Tensor
    """Log-probs under the reference."""
    entropy: Tensor
    """Entropy of the policy's distribution over the next token, nats."""
    advantages: Tensor
    mask: Tensor
    """bool, True where the policy emitted the token and the loss applies to it."""


@dataclass(frozen=True, kw_only=True)
class ValueInputs:
    """The inputs of a value loss, all [B, T]; ``values`` have gradient."""

    values: Tensor
    old_values: Tensor
    """Values at the start of the update."""
    returns: Tensor


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A loss before it is reduced."""

    loss: Tensor
    """Loss per token, [B, T], with gradient."""
    figures: Mapping[str, Tensor]
    """Values per token, [B, T], by metric name; the metric is the mean over emitted tokens."""


def ppo_loss(
    surrogate: SurrogateTerms,
    inputs: LossInputs,
    value: ValueInputs,
    *,
    value_clip: float,
    value_coef: float,
    entropy_coef: float,
) -> LossTerms:
    """surrogate + value_coef * clipped value loss - entropy_coef * entropy, per token.

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 9. ``inputs.ref_logp`` is not read: PPO's KL penalty is in
    its rewards.
    """
    value_loss, value_clipped = clipped_value(value.values, value.old_values, value.returns, clip=value_clip)
    loss = surrogate.loss + value_coef * value_loss
    if entropy_coef:
        loss = loss - entropy_coef * inputs.entropy
    return LossTerms(
        loss=loss,
        figures={
            "loss/policy": surrogate.loss,
            "loss/value": value_loss,
            "entropy": inputs.entropy,
            "policy/clipfrac": surrogate.clipped,
            "val/clipfrac": value_clipped,
            "val/ratio": surrogate.ratio,
            **surrogate.figures,
        },
    )


def grpo_terms(surrogate: SurrogateTerms, advantages: Tensor) -> LossTerms:
    """A surrogate as GRPO reports it: the share that is clipped, by the sign of the advantage."""
    return LossTerms(
        loss=surrogate.loss,
        figures={
            "clip_ratio/low_mean": surrogate.clipped & (advantages < 0),
            "clip_ratio/high_mean": surrogate.clipped & (advantages > 0),
            "clip_ratio/region_mean": surrogate.clipped,
            **surrogate.figures,
        },
    )


def grpo_loss(
    policy: LossTerms,
    inputs: LossInputs,
    *,
    kl_weight: Tensor | float,
    kl_estimator: KLEstimator,
    kl_level: Level,
    entropy_coef: float = 0.0,
) -> LossTerms:
    """policy loss + kl_weight * KL estimate - entropy_coef * entropy, per token; ``kl_weight`` is a number, or [B, 1].

    Source: Shao et al. 2024, arXiv 2402.03300, equation 3.
    """
    kl = kl_terms(inputs, estimator=kl_estimator, level=kl_level)
    loss = policy.loss + kl_weight * kl
    if entropy_coef:
        loss = loss - entropy_coef * inputs.entropy
    return LossTerms(loss=loss, figures={"loss/kl": kl, "entropy": inputs.entropy, **policy.figures})


def kl_terms(inputs: LossInputs, *, estimator: KLEstimator, level: Level) -> Tensor:
    """The KL estimate at each token, [B, T].

    At the sequence level a completion has one estimate, k(sum_t d_t), spread equally over its tokens, so that any
    reduction treats it like the surrogate's sum over tokens.
    """
    d, log_ratio = inputs.logp - inputs.ref_logp, inputs.logp - inputs.old_logp
    if level == "token":
        return kl_penalty(estimator, d, log_ratio)
    whole = kl_penalty(estimator, masked_sum(d, inputs.mask, dim=1), masked_sum(log_ratio, inputs.mask, dim=1))
    return (whole / inputs.mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(d)
