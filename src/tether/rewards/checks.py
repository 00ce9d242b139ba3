"""What can be known of rewards before a run: whether the prompts have what they read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tether.errors import RewardError, TetherError
from tether.models.loading import context_length
from tether.names import closest, did_you_mean
from tether.rewards.combine import Reward, WeightedSum
from tether.rewards.function import GIVEN, FunctionReward, accepted
from tether.rewards.judge import JudgeReward
from tether.rewards.learned import LearnedReward
from tether.types import Prompt

MEASURED = 64
"""Prompts, the longest in characters, that a reward model's own tokenizer counts."""


def prepared(scorer: WeightedSum, data: Mapping[str, Sequence[Prompt]], *, max_new_tokens: int) -> WeightedSum:
    """The scorer, which knows the columns of the ``data``: source to prompts.

    Raises :class:`RewardError` where a source lacks a column that a reward needs, or has a prompt that a reward model
    cannot read with ``max_new_tokens`` behind it.
    """
    return WeightedSum(tuple((_prepared(reward, data, max_new_tokens), weight) for reward, weight in scorer.rewards))


def _prepared(reward: Reward, data: Mapping[str, Sequence[Prompt]], max_new_tokens: int) -> Reward:
    found = {source: columns_of(prompts) for source, prompts in data.items() if prompts}
    match reward:
        case FunctionReward():
            for source, columns in found.items():
                require_columns(reward, columns, source)
                require_callable(reward, columns)
            return replace(reward, columns=frozenset().union(*found.values()))
        case JudgeReward():
            for source, columns in found.items():
                require_columns(reward, columns, source)
        case LearnedReward():
            for source in found:
                require_readable(reward, data[source], max_new_tokens, source)
    return reward


def columns_of(prompts: Iterable[Prompt]) -> frozenset[str]:
    """The columns that any of the prompts has."""
    return frozenset(name for prompt in prompts for name in prompt.columns)


def require_columns(reward: FunctionReward | JudgeReward, columns: frozenset[str], source: str) -> None:
    """Raise :class:`RewardError` where none of the prompts has a column that the reward needs."""
    if missing := sorted(reward.needs - columns):
        found = f"the columns are {', '.join(sorted(columns))}" if columns else "there are no columns but the prompt"
        raise RewardError(
            f"reward {reward.name!r} needs the column {missing[0]!r}, which no prompt has",
            where=source,
            hint=f"{did_you_mean(closest(missing[0], [*GIVEN, *sorted(columns)]))} {found}".lstrip(),
        )


def require_callable(reward: FunctionReward, columns: frozenset[str]) -> None:
    """Raise :class:`RewardError` where the function cannot be called with what it is given, by name."""
    try:
        inspect.signature(reward.function).bind(**accepted(reward.function, dict.fromkeys([*GIVEN, *columns])))
    except (TypeError, ValueError) as error:  # a parameter that has no name; a compiled function without a signature
        raise RewardError(
            f"reward {reward.name!r} cannot be called ({error})",
            hint=f"it gets {', '.join([*GIVEN, *sorted(columns)])} by name, each where it has a parameter for it",
        ) from None


def require_readable(reward: LearnedReward, prompts: Sequence[Prompt], max_new_tokens: int, source: str) -> None:
    """Raise :class:`RewardError` where the reward model cannot render a prompt, or has no room for it and for
    ``max_new_tokens``; where its vocabulary is not the policy's, for a completion of one token, since its own tokens of
    longer ones are not known yet.
    """
    own = [prompt for prompt in prompts if not reward.reads_ids(prompt)]
    try:
        longest = max((reward.length_around(prompt) for prompt in longest_texts(reward, own)), default=0)
    except TetherError as error:
        error.at(f"reward {reward.name!r}")
        error.at(source)
        raise
    shared = max((len(prompt.ids) for prompt in prompts if reward.reads_ids(prompt)), default=0)
    after = max_new_tokens if reward.same_vocabulary else 1
    limit = context_length(reward.model)
    needed = max(shared + max_new_tokens if shared else 0, longest + after if longest else 0)
    if needed > limit:
        raise RewardError(
            f"reward {reward.name!r}: the longest prompt and its completion take up to {needed} tokens, "
            f"and the reward model reads {limit}",
            where=source,
            hint="lower max_new_tokens, or leave long prompts out",
        )


def longest_texts(reward: LearnedReward, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The :data:`MEASURED` prompts that are longest as the reward model renders them."""
    return sorted(prompts, key=lambda prompt: -len(reward.rendered(prompt)))[:MEASURED]
