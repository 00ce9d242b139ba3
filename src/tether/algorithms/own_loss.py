"""A loss of one's own, in place of GRPO's clipped surrogate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tether.errors import ConfigError
from tether.ops.divergence import KLEstimator
from tether.ops.losses import Level, LossInputs, LossTerms, kl_terms

Loss = Callable[[LossInputs], LossTerms]
"""A loss per token, and figures per token by metric name; ``examples/own_loss.py`` is one."""


def with_kl(
    terms: LossTerms, inputs: LossInputs, kl_weight: Tensor, *, estimator: KLEstimator, level: Level
) -> LossTerms:
    """The terms of a loss of one's own plus the KL term, whose ``kl_weight`` is [B, 1]. Raises :class:`ConfigError`
    where the loss, or a figure, is not one number per token, [B, T]."""
    for name, values in {"the loss": terms.loss, **terms.figures}.items():
        if values.shape != inputs.mask.shape:
            found, expected = list(values.shape), list(inputs.mask.shape)
            raise ConfigError(f"{name} has the shape {found}, and one number per token has {expected}", where="loss")
    kl = kl_terms(inputs, estimator=estimator, level=level)
    return LossTerms(
        loss=terms.loss + kl_weight * kl, figures={"loss/kl": kl, "entropy": inputs.entropy, **terms.figures}
    )
