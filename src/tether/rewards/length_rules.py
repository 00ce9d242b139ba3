"""Built-in rewards for the number of tokens of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tether.errors import RewardError
from tether.rewards.text_rules import Rule, count


def length(argument: str | None) -> Rule:
    """``length:N``: -|tokens - N| / N, which is 0 at N tokens, and -1 at 0 and 2 N."""
    target = count(argument or "")
    if target is None:
        raise RewardError("reward 'length' needs a target in tokens, such as length:40")

    def rule(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-abs(len(ids) - target) / target for ids in completion_ids]

    return rule


def overlong(argument: str | None) -> Rule:
    """``overlong:L_MAX:L_CACHE``: the soft overlong punishment of DAPO, arXiv 2503.14476, equation 13. For L tokens

    R = 0 where L <= L_MAX - L_CACHE;  (L_MAX - L_CACHE - L) / L_CACHE where L <= L_MAX;  -1 where it is more.
    """
    first, _, second = (argument or "").partition(":")
    limit, cache = count(first), count(second)
    if limit is None or cache is None or cache > limit:
        raise RewardError(
            "reward 'overlong' needs the longest length in tokens, and how far below it the penalty begins, "
            "such as overlong:400:80"
        )
    free = limit - cache

    def rule(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-min(1.0, max(0, len(ids) - free) / cache) for ids in completion_ids]

    return rule
