"""Dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476): groups of equal rewards are replaced by new prompts'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from tether.algorithms.pending import Rollouts
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import applies_of, first_of, generator_figures, roll_out, scores_of
from tether.figures import Figures, Mean, Sum
from tether.ops.advantages import zero_variance
from tether.types import Generator, Prompt, Sampling, ScoredGroup, Scorer
from tether.world import World


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


def roll_out_groups(
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    policy: PreTrainedModel,
    group_size: int,
    sampling: Sampling,
    seed: Callable[[int], int],
    replacements: int,
    fresh: Callable[[int], Sequence[Prompt]] | None,
    world: World,
) -> Rollouts:
    """The rollouts of a step: scored groups of the prompts, or with ``replacements`` of others in place of those of
    zero variance (:func:`dynamically`). ``seed(n)`` is that of attempt n."""
    first, clock = first_of(prompts, world), PhaseClock(policy.device)

    def attempt(wanted: Sequence[Prompt], number: int) -> list[ScoredGroup]:
        return roll_out(
            wanted,
            generator=generator,
            scorer=scorer,
            policy=policy,
            group_size=group_size,
            sampling=sampling,
            seed=seed(number),
            first=first,
            clock=clock,
        )

    groups, figures, drawn = dynamically(prompts, attempt, replacements=replacements, fresh=fresh)
    return Rollouts(groups=groups, figures=figures | generator_figures(generator), clock=clock, drawn=drawn)
