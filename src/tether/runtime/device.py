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
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device {name!r} is not one that tether knows; give auto, cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not available here; give auto or cpu")
    return torch.device(name)


def pick_dtype(name: Dtype) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
