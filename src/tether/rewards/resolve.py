"""From ``--reward`` values to a scorer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tether.errors import RewardError
from tether.models.loading import BASE
from tether.models.precision import round_products
from tether.models.reward import load_reward_model
from tether.rewards.combine import Reward, WeightedSum
from tether.rewards.function import FunctionReward, load_function
from tether.rewards.learned import LearnedReward
from tether.rewards.rules import RULES


def split_weight(spec: str) -> tuple[str, float]:
    """``"R=0.5"`` as ``("R", 0.5)``; without a number after the last ``=`` all of it is the name, and the weight 1."""
    name, _, tail = spec.rpartition("=")
    try:
        weight = float(tail)
    except ValueError:
        return spec, 1.0
    if not name:
        return spec, 1.0
    if not math.isfinite(weight):
        raise RewardError(f"--reward {spec}: the weight must be a finite number")
    return name, weight


def resolve_reward(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    rounded: bool = False,
    deadline: float | None = None,
    retries: int = 0,
) -> Reward:
    """The reward behind a name: a rule, a Python function or a reward model, tried in this order.

    ``deadline`` (seconds) and ``retries`` are a Python function's: what comes with tether neither hangs nor recovers.
    """
    rule, colon, argument = spec.partition(":")
    if rule in RULES:
        return FunctionReward(rule, RULES[rule](argument if colon else None))
    if "://" in spec:
        raise RewardError(f"{spec}: a reward is a rule, a local file or module, or a model, not an address")
    if ":" in spec:
        return load_function(spec, deadline=deadline, retries=retries)
    if spec.endswith(".py"):
        raise RewardError(f"{spec}: name the function too, as in {spec}:FUNCTION")
    if not os.path.exists(spec) and spec.count("/") != 1 and spec != BASE:
        raise RewardError(
            f"{spec}: no such reward; give a reward-model directory or hub id, file.py:function, module:function, "
            f"or one of {', '.join(RULES)}"
        )
    model, own = load_reward_model(spec, dtype=dtype, device=device)
    if rounded:
        round_products(model)
    name = Path(spec).parent.name if Path(spec).name == "model" else Path(spec).name
    return LearnedReward(
        name, model.requires_grad_(False), own, own.get_vocab().items() >= tokenizer.get_vocab().items()
    )


def resolve_scorer(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounded: bool = False,
    deadline: float | None = None,
    retries: int = 0,
) -> WeightedSum:
    """All ``--reward`` values as one scorer.

    ``rounded`` gives reward models :func:`tether.models.precision.round_products`; ``deadline`` and ``retries`` are
    those of each :class:`tether.rewards.function.FunctionReward` from a file or a module.
    """
    named = [split_weight(spec) for spec in specs]  # all of them, before the first takes its time to load
    resolve = partial(
        resolve_reward,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        rounded=rounded,
        deadline=deadline,
        retries=retries,
    )
    return WeightedSum(tuple((resolve(name), weight) for name, weight in named))
