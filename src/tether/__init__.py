"""Align a language model to what people prefer: reward models, rejection sampling, PPO and GRPO on one machine.

The names below are what your own training loop needs; each is imported when it is first used, so that ``import tether``
alone costs nothing. ``examples/own_loop.py`` is such a loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
    from tether.algorithms.optimise import Optim
    from tether.data.records import load_demonstrations, load_pairs, load_prompts
    from tether.evaluation import evaluate_policy, policy_kl, sample_and_score
    from tether.generation.engine import Engine
    from tether.models.loading import context_length, load_policy, save_model
    from tether.models.reward import load_reward_model, new_reward_model, save_reward_model
    from tether.rewards.combine import WeightedSum
    from tether.rewards.function import FunctionReward
    from tether.rewards.resolve import resolve_scorer
    from tether.types import Budget, Prompt, Sampling, make_requests

__version__ = "0.1.0"

_HOMES = {
    "tether.algorithms": ("grpo", "ppo", "rejection_sampling", "reward_model", "sft"),
    "tether.algorithms.optimise": ("Optim",),
    "tether.data.records": ("load_demonstrations", "load_pairs", "load_prompts"),
    "tether.evaluation": ("evaluate_policy", "policy_kl", "sample_and_score"),
    "tether.generation.engine": ("Engine",),
    "tether.models.loading": ("context_length", "load_policy", "save_model"),
    "tether.models.reward": ("load_reward_model", "new_reward_model", "save_reward_model"),
    "tether.rewards.combine": ("WeightedSum",),
    "tether.rewards.function": ("FunctionReward",),
    "tether.rewards.resolve": ("resolve_scorer",),
    "tether.types": ("Budget", "Prompt", "Sampling", "make_requests"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "Engine",
    "FunctionReward",
    "Optim",
    "Prompt",
    "Sampling",
    "WeightedSum",
    "__version__",
    "context_length",
    "evaluate_policy",
    "grpo",
    "load_demonstrations",
    "load_pairs",
    "load_policy",
    "load_prompts",
    "load_reward_model",
    "make_requests",
    "new_reward_model",
    "policy_kl",
    "ppo",
    "rejection_sampling",
    "resolve_scorer",
    "reward_model",
    "sample_and_score",
    "save_model",
    "save_reward_model",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    home = _HOME[name]
    if home == "tether.algorithms":
        return importlib.import_module(f"{home}.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
