"""Supervised fine-tuning: ``run`` does all of it in one call, and the rest is for a loop of your own."""

from __future__ import annotations

from tether.algorithms.sft import Config, State, evaluate, step, steps
from tether.api.training import runner

__all__ = ["Config", "State", "evaluate", "run", "step", "steps"]

run = runner("sft", __name__)
