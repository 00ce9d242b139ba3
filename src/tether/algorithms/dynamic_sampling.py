"""Dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476): groups of equal rewards are replaced by new prompts'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tether.algorithms.rollouts import applies_of, scores_of
from tether.figures import Figures, Mean, Sum
from tether.ops.advantages import zero_variance
from tether.types import Prompt, ScoredGroup


def dynamically(
    prompts: Sequence[Prompt],
    roll: Callable[[Sequence[Prompt], int], list[ScoredGroup]],
    *,
    replacements: int,
    fresh: Callable[[int], Sequence[Prompt]] | None,
) -> tuple[tuple[ScoredGroup, ...], Figures, tuple[int, ...]]:
    """As many groups as ``prompts``. Those of zero variance are replaced by groups of the prompts that ``fresh(n)``
    gives, up to ``replacements`` times; what is missing then is filled with them.

    ``roll(prompts, n)`` gives the scored groups of attempt n, from 0. The figures are ``sampling/groups_drawn`` and
    ``sampling/frac_zero_std_drawn``, over all sampled groups. The numbers are those that ``fresh`` was called with.
    """
    kept: list[ScoredGroup] = []
    flat: list[ScoredGroup] = []
    asked: list[int] = []
    wanted, host = list(prompts), torch.device("cpu")
    for attempt in range(replacements + 1):
        scored = roll(wanted, attempt)
        equal = zero_variance(scores_of(scored, host), applies_of(scored, host)).tolist()
        kept += [group for group, same in zip(scored, equal, strict=True) if not same]
        flat += [group for group, same in zip(scored, equal, strict=True) if same]
        missing = len(prompts) - len(kept)
        if missing == 0 or fresh is None or attempt == replacements:
            break
        asked.append(missing)
        wanted = list(fresh(missing))
    drawn = len(kept) + len(flat)
    figures: Figures = {
        "sampling/groups_drawn": Sum(float(drawn)),
        "sampling/frac_zero_std_drawn": Mean(len(flat) / drawn, drawn),
    }
    return tuple((kept + flat)[: len(prompts)]), figures, tuple(asked)
