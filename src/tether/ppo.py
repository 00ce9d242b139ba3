"""Proximal policy optimisation: ``run`` does all of it in one call, and the rest is for a loop of your own."""

from __future__ import annotations

from tether.algorithms.ppo import Config, State, step
from tether.api.training import runner

__all__ = ["Config", "State", "run", "step"]

run = runner("ppo", __name__)
