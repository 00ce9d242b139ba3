"""Statistics over the real tokens of a padded tensor.

Masked positions are selected away with ``where`` rather than multiplied by zero, because 0 * NaN is NaN and padding may
hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``x`` where ``mask`` is True, over everything or along ``dim``. ``x`` and ``mask`` have one shape."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; 0 where a slice has no True at all.

    This is a statistic for metrics and whitening. A loss uses :mod:`tether.ops.reduce`, whose denominator is passed in.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of ``x`` over the True positions: sum (x - mean)^2 / n, or / (n - 1) when ``unbiased``."""
    centred = x - masked_mean(x, mask)
    denominator = mask.sum() - int(unbiased)
    return masked_sum(centred.square(), mask) / denominator.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool, unbiased: bool = False, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the True positions; others become 0.

    ``shift_mean`` says what happens to the mean: True leaves the result centred on zero (PPO's advantages), False adds
    the mean back so that only the scale changes (PPO's rewards). The variance is the biased one unless ``unbiased``.
    Source: Huang et al. 2024, arXiv 2403.17031, details 16 and 17.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
