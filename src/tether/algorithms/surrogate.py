"""The policy's part of the loss in PPO and GRPO: which surrogate, what corrects for the sampler, what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tether.algorithms.experience import Sampled
from tether.errors import ConfigError
from tether.ops.losses import LossInputs
from tether.ops.masked import masked_mean
from tether.ops.surrogates import Level, Mismatch, PolicyLoss, SurrogateTerms, mismatch_weights, surrogate
from tether.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The policy's loss."""

    policy_loss: PolicyLoss = "clip"
    """Surrogate: PPO's clip, whose gradient is 0 outside of the bounds; cispo, which bounds a token's weight and keeps
    its gradient; or sapo, a smooth gate in place of a bound."""
    clip_low: float = 0.2
    """Lower clip of the importance ratio: 1 - this. Only clip has one."""
    clip_high: float = 0.2
    """Upper clip of the importance ratio: 1 + this, of clip and cispo. A value above clip_low is DAPO's clip-higher."""
    clip_dual: float | None = None
    """Dual clip: upper bound of the ratio of tokens with a negative advantage, at least 1 + clip_high; the two-sided
    clip's delta. By default their loss has no bound. Only clip has one."""
    sapo_tau_pos: float = 1.0
    """Temperature of sapo's gate for positive advantages."""
    sapo_tau_neg: float = 1.05
    """Temperature of sapo's gate for the others: a higher one falls faster."""
    mismatch: Mismatch = "off"
    """Correction for a sampler that does not compute the trainer's distribution: weights of the surrogate that are
    truncated (tis) or masked (mis) above mismatch_cap. When off, the importance ratio is to the sampler itself."""
    mismatch_level: Level = "token"
    """Level of these weights: of each token, or of the whole sequence."""
    mismatch_cap: float = 2.0
    """Cap of these weights."""
    mask_truncated: bool = False
    """Leave completions that were cut at the length limit out of the loss (DAPO's overlong filtering)."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "clip_low must lie in (0, 1]": 0 < self.clip_low <= 1,
                "clip_high must be positive": self.clip_high > 0,
                "clip_dual must be at least 1 + clip_high": self.clip_dual is None
                or self.clip_dual >= 1 + self.clip_high,
                "clip_dual is for policy_loss clip": self.clip_dual is None or self.policy_loss == "clip",
                "sapo_tau_pos must be positive": self.sapo_tau_pos > 0,
                "sapo_tau_neg must be positive": self.sapo_tau_neg > 0,
                "mismatch_cap must be positive": self.mismatch_cap > 0,
            },
        )


def surrogate_of(inputs: LossInputs, options: Surrogate, *, ratio_level: Level = "token") -> SurrogateTerms:
    """The surrogate of the inputs, per token, with its weights. ``ratio_level = "sequence"`` uses one ratio per
    completion, exp(mean log-ratio) (GSPO, arXiv 2507.18071)."""
    log_ratio = inputs.logp - inputs.old_logp
    if ratio_level == "sequence":
        log_ratio = masked_mean(log_ratio, inputs.mask, dim=1).unsqueeze(1).expand_as(log_ratio)
    terms = surrogate(
        options.policy_loss,
        log_ratio,
        inputs.logp,
        inputs.advantages,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        clip_dual=options.clip_dual,
        sapo_tau_pos=options.sapo_tau_pos,
        sapo_tau_neg=options.sapo_tau_neg,
    )
    if options.mismatch == "off":
        return terms
    weights, over = mismatch_weights(
        inputs.old_logp - inputs.sampler_logp,
        inputs.mask,
        kind=options.mismatch,
        level=options.mismatch_level,
        cap=options.mismatch_cap,
    )
    figures = {
        "sampling/importance_sampling_ratio/mean": weights,
        "sampling/importance_sampling_ratio/capped": over,
    }
    return replace(terms, loss=weights * terms.loss, figures=figures)


OldLogp = Literal["sampler", "pass", "update"]


def old_logp_from(options: Surrogate, sampling: Sampling, *, from_update: bool) -> OldLogp:
    """Where ``old_logp`` comes from: the sampler; a pass of the policy before the update; or, where the sampler's is
    not trusted and ``from_update`` says that it will do, the pass of the update's only optimizer step."""
    if sampling.truncated:
        return "pass"
    if options.mismatch == "off":
        return "sampler"
    return "update" if from_update else "pass"


def inputs_of(sampled: Sampled, logp: Tensor, entropy: Tensor, advantages: Tensor, *, old: OldLogp) -> LossInputs:
    """The loss inputs of sampled completions, whose ``logp`` and ``entropy`` [B, T] are those of the current policy."""
    return LossInputs(
        logp=logp,
        old_logp=logp.detach() if old == "update" else sampled.old_logp,
        sampler_logp=sampled.sampler_logp,
        ref_logp=sampled.ref_logp,
        entropy=entropy,
        advantages=advantages,
        mask=sampled.loss_mask,
    )
