"""A loss of one's own, in place of the surrogate of GRPO."""

from __future__ import annotations

from collections.abc import Callable

from tether.errors import ConfigError
from tether.ops.losses import LossInputs, LossTerms

Loss = Callable[[LossInputs], LossTerms]
"""A loss per token, and figures per token by metric name; ``examples/own_loss.py`` is one."""


def own_terms(loss: Loss, inputs: LossInputs) -> LossTerms:
    """What ``loss`` makes of the inputs. Raises :class:`ConfigError` where the loss, or a figure, is not one number per
    token, [B, T]."""
    terms = loss(inputs)
    for name, values in {"the loss": terms.loss, **terms.figures}.items():
        if values.shape != inputs.mask.shape:
            found, expected = list(values.shape), list(inputs.mask.shape)
            raise ConfigError(f"{name} has the shape {found}, and one number per token has {expected}", where="loss")
    return terms
