"""A model in one short number, to tell whether it is still the one it was."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor, nn

_AS_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def weights_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits of the names, shapes and bits of a model's weights, on whatever device they lie.

    A weight counts by two sums over its bit patterns as integers, one of them weighted by position, which are exact in
    whatever order they are added up, and take one reading of the memory.
    """
    digest = blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bit_sums(weight)}\n".encode())
    return digest.hexdigest()


def bit_sums(weight: Tensor) -> tuple[int, int]:
    """Sum of the bit patterns, and of their rows' sums times the rows' numbers; both modulo 2^64."""
    bits = weight.detach().contiguous().view(_AS_INTEGERS[weight.element_size()])
    rows = bits.reshape(weight.size(0), -1) if weight.dim() else bits.reshape(1, 1)
    sums = rows.sum(1, dtype=torch.int64)
    numbers = torch.arange(1, len(sums) + 1, device=sums.device)
    return int(sums.sum()), int((sums * numbers).sum())
