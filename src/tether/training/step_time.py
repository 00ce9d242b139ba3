"""How long a step takes: what it computes, at the measured speed of products and of memory.

    sampling   FLOPs of the prompts / rate + decoding steps * 2 * weights * rows / rate of a product of so few rows
    scoring    FLOPs of a forward pass of the reward models / rate
    reference  FLOPs of a forward pass of reference and critic / rate
    update     FLOPs of forward and backward passes / rate + bytes that AdamW reads and writes / bandwidth

The rates are those of large products alone, so that a step takes longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.models.flops import forward_flops, shape_of, training_factor
from tether.models.trainable import trainable
from tether.runtime.device import matrix_rate
from tether.training.workload import Workload

ADAM_BYTES = 28
"""Per weight: gradient, weight and two moments are read, and all but the gradient written, 4 bytes each."""
DECODED = 2048, 8192
"""Size of the matrix of which the products of a decoding step are measured: larger than most caches."""
SECONDS = 0.2
"""That a measurement takes."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What a step computes, in FLOPs unless said otherwise."""

    prompts: float = 0.0
    decoding_steps: int = 0
    rows: int = 1
    """Completions in a decoding step."""
    weights: int = 0
    """Weights of the policy."""
    scoring: float = 0.0
    reference: float = 0.0
    update: float = 0.0
    adapted: float = 0.0
    """Weights that optimizer steps change, all together."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The speed of a device."""

    large: float
    """FLOP/s of large products."""
    few_rows: float
    """FLOP/s of the products of a decoding step."""
    bandwidth: float
    """Bytes per second that are read and written."""


def amounts_of(
    work: Workload,
    policy: PreTrainedModel,
    trunks: Sequence[PreTrainedModel],
    judges: Sequence[PreTrainedModel],
    *,
    in_flight: int,
) -> Amounts:
    """What a step of ``work`` computes, with critics that have ``trunks`` of their own."""
    shape, own = shape_of(policy), [shape_of(trunk) for trunk in trunks]
    groups = work.sampled.groups if work.sampled else []
    completions = [length for _, lengths in groups for length in lengths]
    forward = forward_flops(shape, work.rows) + sum(forward_flops(one, work.rows) for one in own)
    all_rows = forward_flops(shape, groups) + sum(forward_flops(one, groups) for one in own)
    trained = sum(weight.numel() for weight in trainable(policy).values())
    rows = min(in_flight, len(completions)) or 1
    return Amounts(
        prompts=forward_flops(shape, [(prompt, []) for prompt, _ in groups]),
        decoding_steps=max(completions, default=0) * math.ceil(len(completions) / rows),
        rows=rows,
        weights=shape.trunk + shape.head,
        scoring=sum(forward_flops(shape_of(judge), groups) for judge in judges),
        reference=all_rows if work.reference else 0.0,
        update=work.updates * training_factor(policy) * forward,
        adapted=work.updates * trained,
    )


def seconds(amounts: Amounts, rates: Rates) -> dict[str, float]:
    """Seconds of each phase of a step; of those that it has."""
    decoding = amounts.decoding_steps * 2 * amounts.weights * amounts.rows / rates.few_rows
    found = {
        "sampling": amounts.prompts / rates.large + decoding,
        "scoring": amounts.scoring / rates.large,
        "reference": amounts.reference / rates.large,
        "update": amounts.update / rates.large + ADAM_BYTES * amounts.adapted / rates.bandwidth,
    }
    return {name: value for name, value in found.items() if value}


def measured(dtype: torch.dtype, device: torch.device, *, rows: int) -> Rates:
    """The speed of ``device`` for weights of ``dtype``, measured for half a second; ``rows`` are those of a decoding
    step."""
    weight = torch.randn(DECODED, device=device).to(dtype)
    x = torch.randn(rows, DECODED[0], device=device).to(dtype)
    source = torch.zeros(DECODED[0] * DECODED[1], device=device)
    target = torch.empty_like(source)
    return Rates(
        large=matrix_rate(dtype, device),
        few_rows=2 * rows * weight.numel() / per_call(lambda: x @ weight, device),
        bandwidth=2 * source.nbytes / per_call(lambda: target.copy_(source), device),
    )


def per_call(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a call, the least within :data:`SECONDS`."""
    best, stop = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
