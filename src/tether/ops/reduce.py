"""From one number per token to one number per step.

A loss is a sum of per-token terms divided by a denominator that belongs to the *optimizer step*. The denominator is
counted once, before anything is split into micro-batches or over ranks, and passed in here: then the losses of the
parts add up to exactly the loss of the whole, and the gradient does not depend on how the step was split.

``x`` and ``mask`` are [B, T] throughout; the result is a scalar.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tether.ops.masked import masked_mean, masked_sum

Reduction = Literal["sequence_mean", "token_mean", "fixed_length"]


def token_mean(x: Tensor, mask: Tensor, *, tokens: int) -> Tensor:
    """sum over tokens / ``tokens``, the real tokens of the whole step. Long completions weigh more (DAPO)."""
    return masked_sum(x, mask) / tokens


def sequence_mean(x: Tensor, mask: Tensor, *, sequences: int) -> Tensor:
    """sum over completions of the mean over its tokens / ``sequences``, the completions of the whole step (GRPO)."""
    return masked_mean(x, mask, dim=1).sum() / sequences


def fixed_length(x: Tensor, mask: Tensor, *, sequences: int, max_length: int) -> Tensor:
    """sum over tokens / (``sequences`` * ``max_length``), independent of the completions' lengths (Dr. GRPO)."""
    return masked_sum(x, mask) / (sequences * max_length)


def reduce_loss(
    x: Tensor, mask: Tensor, *, reduction: Reduction, sequences: int, tokens: int, max_length: int
) -> Tensor:
    """One of the reductions above, by name; ``sequences`` and ``tokens`` are counts of the whole optimizer step."""
    match reduction:
        case "sequence_mean":
            return sequence_mean(x, mask, sequences=sequences)
        case "token_mean":
            return token_mean(x, mask, tokens=tokens)
        case "fixed_length":
            return fixed_length(x, mask, sequences=sequences, max_length=max_length)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True on the first ``lengths[b]`` positions: which are not padding. [B] -> [B, ``width``]."""
    return torch.arange(width, device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)
