"""A model in one short number, to tell whether it is still the one it was."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor, nn

CHUNK = 4096
"""Words that are summed up before their place counts."""


def weights_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits of the names, shapes and bits of a model's weights, on whatever device they lie.

    It takes one reading of the memory, because a weight counts by :func:`bit_sums` alone: another training, model or
    precision is told apart, not a forgery.
    """
    digest = blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bit_sums(weight)}\n".encode())
    return digest.hexdigest()


def bit_sums(weight: Tensor) -> list[int]:
    """Sums modulo 2^64 over a tensor's bits as integers of 64: of all, and of each chunk's sum times its number; then
    the bytes that are left over. Integers add up to the same in any order.
    """
    octets = weight.detach().contiguous().flatten().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets[: len(octets) // 8 * 8].view(torch.int64)
    whole = words[: len(words) // CHUNK * CHUNK].view(-1, CHUNK).sum(1)
    sums = torch.cat([whole, words[len(whole) * CHUNK :].sum().view(1)])
    numbers = torch.arange(1, len(sums) + 1, device=sums.device)
    return [int(sums.sum()), int((sums * numbers).sum()), *octets[len(words) * 8 :].tolist()]
