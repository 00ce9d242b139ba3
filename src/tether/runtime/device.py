"""Which device and which dtype, how fast it is and how much memory was used."""

from __future__ import annotations

import resource
import sys
import time
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tether.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Products = Literal["auto", "float32", "bfloat16"]
WORTH_ROUNDING = 1.5
"""How much faster bfloat16 products have to be to be taken unasked."""
SMALL_MATRIX = 2**16
"""Weights of a matrix, of which smaller ones gain nothing."""


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device {name!r} is not one that tether knows; give auto, cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not available here; give auto or cpu")
    return torch.device(name)


def pick_dtype(name: Dtype) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_products(name: Products, model: nn.Module) -> Dtype:
    """What a model of float32 weights multiplies in; weights of bfloat16 leave no choice.

    ``auto`` takes bfloat16 where large products in it are faster by half at least, which hardware either has
    instructions for or not, so that the answer does not hang on the moment. A model too small to gain stays in float32.
    """
    if name != "auto":
        return name
    largest = max(
        (layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)), key=Tensor.numel
    )
    if largest.dtype == torch.bfloat16:
        return "bfloat16"
    if largest.numel() < SMALL_MATRIX:
        return "float32"
    full, rounded = (matrix_rate(dtype, largest.device) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if rounded >= WORTH_ROUNDING * full else "float32"


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, 2 n^3 operations: the best reading in a tenth of a second.

    On CUDA a reading is several products in a row, so that the wait for the last one does not count much.
    """
    size, products = (4096, 8) if device.type == "cuda" else (1024, 1)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best, stop = 0.0, time.perf_counter() + 0.1
    while best == 0.0 or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(products):
            product = a @ b
        float(product[0, 0])
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best


def forget_peak(device: torch.device) -> None:
    """The peak of memory is measured from here on, where the device can do that: CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """The most GiB that tensors held since :func:`forget_peak` on CUDA; else the largest resident set of the process,
    from its start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
