"""The peak of the memory that torch has allocated while some work runs, above what it held before.

On a GPU the allocator keeps the count. On a CPU the profiler records every allocation and release of torch's allocator,
including those inside an operation; their running sum is the live memory. Memory that a matrix library allocates itself
is not included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(changes: Iterable[int]) -> int:
    """The highest running sum of allocations (positive) and releases (negative), at least 0."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Bytes at the peak of ``work``, above what was live before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return peak_of(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
