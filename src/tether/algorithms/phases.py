"""What a step spends its time on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from tether.types import Metrics

Phase = Literal["generate", "score", "reference", "advantage", "update", "eval"]
"""``reference`` is every pass without gradient over what was sampled: old and reference log-probs, values."""


class PhaseClock:
    """The seconds of one step's phases: ``with clock.phase("score"): ...``; a phase entered twice adds up.

    On CUDA a phase ends when the device has done all it was given, so that no phase pays for the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """``time/PHASE`` of each phase there was."""
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}
