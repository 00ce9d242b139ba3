"""The device and the dtypes, the device's speed and the memory used."""

from __future__ import annotations

import sys
import time
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tether.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
MatmulDtype = Literal["auto", "float32", "bfloat16"]
WORTH_ROUNDING = 1.5
"""How much faster than float32 bfloat16 must be for ``auto`` to choose it."""
SMALL_MATRIX = 2**16
"""Weights of a matrix; smaller ones gain nothing from bfloat16."""


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device {name!r} is not one that tether knows", hint="give auto, cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not available here", hint="give auto or cpu")
    return torch.device(name)


def pick_dtype(name: Dtype) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_matmul_dtype(name: MatmulDtype, model: nn.Module, device: torch.device | None = None) -> Dtype:
    """The dtype of the matrix products of a model with float32 weights, on its device unless one is given; bfloat16
    weights leave no choice.

    ``auto`` is bfloat16 where large products are at least 1.5 times as fast in it. Hardware either has instructions for
    them or not, so that the answer does not vary between runs. A model too small to gain stays in float32.
    """
    if name != "auto":
        return name
    largest = max(
        (layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)), key=Tensor.numel
    )
    if largest.dtype != torch.float32:
        return "bfloat16"
    if largest.numel() < SMALL_MATRIX:
        return "float32"
    full, rounded = (matrix_rate(dtype, device or largest.device) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if rounded >= WORTH_ROUNDING * full else "float32"


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product, 2 n^3 operations: the best measurement within 0.1 s.

    On CUDA each measurement is of several products, so that the wait for the last one matters little.
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
    """Restart the measurement of peak memory, on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """On CUDA, the most GiB that tensors held since :func:`forget_peak`; else the largest resident set of the process
    since its start, in GiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


try:
    import resource
except ImportError:  # Windows
    import ctypes

    class MemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        )

    def peak_resident_bytes() -> int:
        """The most memory that this process has had in RAM."""
        system, counters = ctypes.WinDLL("kernel32", use_last_error=True), MemoryCounters()  # type: ignore[attr-defined, unused-ignore]
        system.GetCurrentProcess.restype = ctypes.c_void_p
        get = system.K32GetProcessMemoryInfo
        get.argtypes = (ctypes.c_void_p, ctypes.POINTER(MemoryCounters), ctypes.c_uint32)
        counters.cb = ctypes.sizeof(counters)
        if not get(system.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
            raise OSError(ctypes.get_last_error(), "the memory of the process cannot be read")  # type: ignore[attr-defined, unused-ignore]
        return int(counters.PeakWorkingSetSize)

else:

    def peak_resident_bytes() -> int:
        """The most memory that this process has had in RAM."""
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
