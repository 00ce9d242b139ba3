"""A short fingerprint of a model's weights, to tell whether they have changed."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor, nn

CHUNK = 4096
"""64-bit words per chunk; within a chunk the order of words does not count."""


def weights_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits from the names, shapes, dtypes and bits of a model's weights, the same on every device.

    It reads the weights once, because they enter through :func:`bit_sums` only. It detects other weights, models and
    precisions, but not a deliberate forgery.
    """
    digest = blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bit_sums(weight)}\n".encode())
    return digest.hexdigest()


def bit_sums(weight: Tensor) -> list[int]:
    """Sums modulo 2^64 over a tensor's bits as 64-bit integers: of all words, and of each chunk's sum times its number;
    then the remaining bytes. Integer sums do not depend on the order of addition.
    """
    octets = weight.detach().contiguous().flatten().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets[: len(octets) // 8 * 8].view(torch.int64)
    whole = words[: len(words) // CHUNK * CHUNK].view(-1, CHUNK).sum(1)
    sums = torch.cat([whole, words[len(whole) * CHUNK :].sum().view(1)])
    numbers = torch.arange(1, len(sums) + 1, device=sums.device)
    return [int(sums.sum()), int((sums * numbers).sum()), *octets[len(words) * 8 :].tolist()]
