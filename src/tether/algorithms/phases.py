"""The time that a step spends in each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from tether.figures import Figures, Max
from tether.types import Metrics

Phase = Literal["generate", "score", "reference", "advantage", "update", "eval"]
"""``reference`` covers all passes over the samples without gradient: old and reference log-probs, values."""


class PhaseClock:
    """Times the phases of one step: ``with clock.phase("score"): ...``. A phase entered twice adds up, and one that
    ends in an error or an interrupt counts too.

    On CUDA a phase ends with a synchronisation, so that its work does not count in the next phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def figures(self) -> Figures:
        """``time/PHASE`` of each phase, in seconds: the maximum over ranks, since all wait for the slowest."""
        return {f"time/{name}": Max(seconds) for name, seconds in self.seconds.items()}

    def metrics(self) -> Metrics:
        """``time/PHASE`` of each phase on this rank, in seconds."""
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}
