"""Rejection sampling, the best of N imitated: ``run`` does it in one call; the rest is for a loop of your own."""

from __future__ import annotations

from tether.algorithms.rejection_sampling import Config, Selected, State, step
from tether.api.training import runner

__all__ = ["Config", "Selected", "State", "run", "step"]

run = runner("rejection-sampling", __name__)
