"""What the machine can do: the rate of a large matrix product and the bandwidth of a large triad."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_seconds(work: Callable[[], object], device: str, *, repeats: int) -> float:
    """The fastest of ``repeats`` runs, after one warm-up run."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def matrix_rate(device: str, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Operations per second of the product of two large square matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device, repeats=repeats)


def bandwidth(device: str, *, repeats: int = 5) -> float:
    """Bytes per second of c = a + s * b over arrays much larger than any cache: two are read, one is written."""
    count = 2**28 if device == "cuda" else 2**25
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return 3 * 4 * count / best_seconds(lambda: torch.add(a, b, alpha=0.5, out=c), device, repeats=repeats)
