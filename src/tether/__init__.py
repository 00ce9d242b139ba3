"""Align a language model to what people prefer: reward models, rejection sampling, PPO and GRPO on one machine.

``tether.grpo.run`` and its siblings train in one call; the other names are what your own training loop needs. Each is
imported when it is first used, so that ``import tether`` alone costs nothing. ``docs/python.md`` describes all of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether import dpo, grpo, ppo, rejection_sampling, reward_model, sft
    from tether.algorithms.optimise import Optim
    from tether.algorithms.surrogate import Surrogate
    from tether.api.measuring import Evaluation, evaluate, generate, score
    from tether.api.result import Run
    from tether.data.records import load_demonstrations, load_pairs, load_prompts
    from tether.errors import (
        ConfigError,
        DataError,
        GuardError,
        MemoryShortError,
        ModelError,
        RewardError,
        RunError,
        TetherError,
    )
    from tether.evaluation import PolicyEvaluation, evaluate_policy, policy_kl, sample_and_score
    from tether.generation.engine import Engine
    from tether.generation.environment import Environment, Observation
    from tether.generation.episodes import Episodes
    from tether.models.loading import context_length, load_policy
    from tether.models.reference import FrozenCopy, Reference, reference_of
    from tether.models.reward import load_reward_model, new_reward_model, save_reward_model
    from tether.models.saving import save_model
    from tether.observers import Alarm, Monitor, StepRecord, Stop
    from tether.ops.losses import LossInputs, LossTerms
    from tether.rewards.combine import Judgement, Reward, WeightedSum
    from tether.rewards.episode import EpisodeReward
    from tether.rewards.function import FunctionReward
    from tether.rewards.resolve import resolve_scorer
    from tether.statistics import Estimate
    from tether.stop_requests import Interrupted
    from tether.types import (
        Budget,
        Completion,
        CompletionFigures,
        Demonstration,
        FinishReason,
        Generator,
        PreferencePair,
        Prompt,
        Request,
        RolloutGroup,
        Sampling,
        Score,
        ScoredGroup,
        Scorer,
        StepResult,
        Turn,
        make_requests,
    )
    from tether.world import World

__version__ = "0.1.0"

_HOMES = {
    "tether": (
        "dpo",
        "grpo",
        "ppo",
        "rejection_sampling",
        "reward_model",
        "sft",
    ),
    "tether.algorithms.optimise": ("Optim",),
    "tether.algorithms.surrogate": ("Surrogate",),
    "tether.api.measuring": (
        "Evaluation",
        "evaluate",
        "generate",
        "score",
    ),
    "tether.api.result": ("Run",),
    "tether.data.records": (
        "load_demonstrations",
        "load_pairs",
        "load_prompts",
    ),
    "tether.errors": (
        "ConfigError",
        "DataError",
        "GuardError",
        "MemoryShortError",
        "ModelError",
        "RewardError",
        "RunError",
        "TetherError",
    ),
    "tether.evaluation": (
        "PolicyEvaluation",
        "evaluate_policy",
        "policy_kl",
        "sample_and_score",
    ),
    "tether.generation.engine": ("Engine",),
    "tether.generation.environment": ("Environment", "Observation"),
    "tether.generation.episodes": ("Episodes",),
    "tether.models.loading": (
        "context_length",
        "load_policy",
    ),
    "tether.models.saving": ("save_model",),
    "tether.models.reference": (
        "FrozenCopy",
        "Reference",
        "reference_of",
    ),
    "tether.models.reward": (
        "load_reward_model",
        "new_reward_model",
        "save_reward_model",
    ),
    "tether.observers": (
        "Alarm",
        "Monitor",
        "StepRecord",
        "Stop",
    ),
    "tether.ops.losses": (
        "LossInputs",
        "LossTerms",
    ),
    "tether.rewards.combine": (
        "Judgement",
        "Reward",
        "WeightedSum",
    ),
    "tether.rewards.episode": ("EpisodeReward",),
    "tether.rewards.function": ("FunctionReward",),
    "tether.rewards.resolve": ("resolve_scorer",),
    "tether.statistics": ("Estimate",),
    "tether.stop_requests": ("Interrupted",),
    "tether.types": (
        "Budget",
        "Completion",
        "CompletionFigures",
        "Demonstration",
        "FinishReason",
        "Generator",
        "PreferencePair",
        "Prompt",
        "Request",
        "RolloutGroup",
        "Sampling",
        "Score",
        "ScoredGroup",
        "Scorer",
        "StepResult",
        "Turn",
        "make_requests",
    ),
    "tether.world": ("World",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Alarm",
    "Budget",
    "Completion",
    "CompletionFigures",
    "ConfigError",
    "DataError",
    "Demonstration",
    "Engine",
    "Environment",
    "EpisodeReward",
    "Episodes",
    "Estimate",
    "Evaluation",
    "FinishReason",
    "FrozenCopy",
    "FunctionReward",
    "Generator",
    "GuardError",
    "Interrupted",
    "Judgement",
    "LossInputs",
    "LossTerms",
    "MemoryShortError",
    "ModelError",
    "Monitor",
    "Observation",
    "Optim",
    "PolicyEvaluation",
    "PreferencePair",
    "Prompt",
    "Reference",
    "Request",
    "Reward",
    "RewardError",
    "RolloutGroup",
    "Run",
    "RunError",
    "Sampling",
    "Score",
    "ScoredGroup",
    "Scorer",
    "StepRecord",
    "StepResult",
    "Stop",
    "Surrogate",
    "TetherError",
    "Turn",
    "WeightedSum",
    "World",
    "__version__",
    "context_length",
    "dpo",
    "evaluate",
    "evaluate_policy",
    "generate",
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
    "reference_of",
    "rejection_sampling",
    "resolve_scorer",
    "reward_model",
    "sample_and_score",
    "save_model",
    "save_reward_model",
    "score",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    if _HOME[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
