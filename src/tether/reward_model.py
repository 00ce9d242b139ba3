"""Reward models from preference pairs: ``run`` does all of it in one call, and the rest is for a loop of your own."""

from __future__ import annotations

from tether.algorithms.reward_model import Config, Evaluation, State, evaluate, finish, sides, step, steps
from tether.api.training import runner

__all__ = ["Config", "Evaluation", "State", "evaluate", "finish", "run", "sides", "step", "steps"]

run = runner("reward", __name__)
