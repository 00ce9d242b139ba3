"""Which device and which dtype."""

from __future__ import annotations

from typing import Literal

import torch

from tether.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not one; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available here; give auto or cpu")
    return device


def pick_dtype(name: Dtype) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
