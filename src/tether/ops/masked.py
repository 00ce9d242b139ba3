"""Statistics over the real tokens of a padded tensor.

Masked positions are removed with ``where`` rather than multiplied by zero, because 0 * NaN is NaN and padding may hold
any value.

``across`` sums a tensor over the ranks, which makes a statistic one of all ranks. By default it is the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Across = Callable[[Tensor], Tensor]


def alone(x: Tensor) -> Tensor:
    """The sum over a single rank."""
    return x


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``x`` where ``mask`` is True, over everything or along ``dim``. ``x`` and ``mask`` have the same shape."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, *, across: Across = alone) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; 0 where a slice has no True.

    This is a statistic for metrics and whitening. A loss uses :mod:`tether.ops.reduce`, whose denominator is passed in.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return across(masked_sum(x, mask, dim)) / across(count).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False, across: Across = alone) -> Tensor:
    """Variance of ``x`` over the True positions: sum (x - mean)^2 / n, or / (n - 1) when ``unbiased``."""
    centred = x - masked_mean(x, mask, across=across)
    denominator = across(mask.sum()) - int(unbiased)
    return across(masked_sum(centred.square(), mask)) / denominator.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, unbiased: bool = False, eps: float = 1e-8, across: Across = alone) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the True positions; others become 0. The variance is the biased one unless
    ``unbiased``. Source: Huang et al. 2024, arXiv 2403.17031, detail 17.
    """
    whitened = (x - masked_mean(x, mask, across=across)) * _inverse_std(x, mask, unbiased, eps, across)
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def rescale(x: Tensor, mask: Tensor, *, unbiased: bool = False, eps: float = 1e-8, across: Across = alone) -> Tensor:
    """x / sqrt(var + eps) over the True positions; others become 0.

    Rewards are scaled without a shift: one that is taken from every token and added back to every token after scaling,
    as whitening about the mean does, adds mean * (1 - 1 / std) per token, and so pays for length.
    """
    scaled = x * _inverse_std(x, mask, unbiased, eps, across)
    return torch.where(mask, scaled, torch.zeros_like(scaled))


def _inverse_std(x: Tensor, mask: Tensor, unbiased: bool, eps: float, across: Across) -> Tensor:
    return torch.rsqrt(masked_var(x, mask, unbiased=unbiased, across=across) + eps)
