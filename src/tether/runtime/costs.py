"""What a step cost: the part of its row that depends on the machine."""

from __future__ import annotations

import torch

from tether.figures import Max, Sum, reduce
from tether.runtime.device import peak_gib
from tether.types import Metrics
from tether.world import World


def costed(
    step: int, metrics: Metrics, seconds: float, *, matrix_rate: float, device: torch.device, world: World
) -> Metrics:
    """The row of a step that took ``seconds`` on this rank: its metrics, and what it cost on all ranks together.

    ``matrix_rate`` is that of the ``device``, in FLOP/s.
    """
    cost = reduce({"seconds": Max(seconds), "rate": Sum(matrix_rate), "gib": Max(peak_gib(device))}, world)
    return {
        "step": float(step),
        **metrics,
        "step_time": cost["seconds"],
        **throughput(metrics, cost["seconds"], matrix_rate=cost["rate"]),
        "memory/peak_gib": cost["gib"],
    }


def throughput(metrics: Metrics, step_time: float, *, matrix_rate: float) -> Metrics:
    """``tokens_per_second``; ``mfu`` of the update, ``mfu/step`` of all phases together.

    mfu = flops/update / (time/update * matrix_rate), mfu/step = sum of flops/PHASE / (step_time * matrix_rate)
    """
    flops = sum(value for name, value in metrics.items() if name.startswith("flops/"))
    return {
        "tokens_per_second": metrics["num_tokens"] / step_time,
        "mfu": metrics["flops/update"] / (metrics["time/update"] * matrix_rate),
        "mfu/step": flops / (step_time * matrix_rate),
    }
