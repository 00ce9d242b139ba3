"""What the completions of a policy on held-out prompts say: alone, beside a reference, and beside other policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tether.errors import ConfigError, RewardError
from tether.evaluation import evaluate_policy
from tether.ops.divergence import best_of_n_kl
from tether.ops.selection import majority_at_k, pass_at_k, selection_weights
from tether.ops.win_rates import length_controlled_win_rate
from tether.report.comparison import more_completions
from tether.rewards.answers import final_answer
from tether.statistics import (
    LEVEL,
    Estimate,
    bootstrap,
    bootstrap_mean,
    known,
    mean_difference,
    mean_interval,
    mean_score,
    share_interval,
    simultaneous,
    win_share,
)
from tether.types import ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Several attempts per prompt."""

    pass_at: tuple[int, ...] = ()
    """Report pass@k for these k, such as 1,4,8: the chance that one of k completions passes; at most group_size."""
    pass_above: float = 0.0
    """A completion passes, or is right, where its reward is above this."""
    majority_at: tuple[int, ...] = ()
    """Report majority@k for these k: the chance that the most frequent final answer of k completions is right."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "pass_at must be at least 1": all(k >= 1 for k in self.pass_at),
                "majority_at must be at least 1": all(k >= 1 for k in self.majority_at),
                "pass_above must be finite": math.isfinite(self.pass_above),
            },
        )

    def require_samples(self, group_size: int, temperature: float) -> None:
        """Raise :class:`ConfigError` where there are too few completions per prompt, or all of them are one."""
        for name, ks in (("pass_at", self.pass_at), ("majority_at", self.majority_at)):
            if ks and max(ks) > group_size:
                raise ConfigError(
                    f"{name} is {max(ks)}, and there are {group_size} completions per prompt",
                    hint=f"give --group-size {max(ks)} or more",
                )
            if ks and max(ks) > 1 and temperature == 0:
                raise ConfigError(f"{name} is {max(ks)}, and at temperature 0 all completions of a prompt are the same")


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of k attempts, over the prompts that have as many completions with a reward."""

    k: int
    share: Estimate


@dataclass(frozen=True, kw_only=True)
class Best:
    """The completion with the highest total of n, over the prompts that have as many with a reward."""

    n: int
    kl_bound: float
    """Nats from the policy itself, at most (:func:`tether.ops.divergence.best_of_n_kl`)."""
    reward: Estimate
    """Its total."""
    rewards: dict[str, float]
    """Mean of each part, over the prompts where it applies to all completions with a total."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """A policy beside another one on the same prompts with the same seeds."""

    difference: Estimate
    """Its mean total less the other's; the interval is a bootstrap over prompts."""
    win_rate: Estimate
    """Share of completions with the higher total, ties half, each prompt weighing the same; the same interval."""
    wilson: Estimate
    """The same with Wilson's interval, for which the bootstrap is no substitute near 0 and 1."""
    equal_length: Estimate
    """The win rate at equal length (:func:`tether.ops.win_rates.length_controlled_win_rate`); a bootstrap."""
    longer_by: float
    """Mean tokens by which its completions are longer."""
    more_completions: int | None
    """As :attr:`tether.report.comparison.Pair.more_completions`."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One policy."""

    name: str
    figures: dict[str, Any]
    """:class:`tether.evaluation.PolicyEvaluation` as a dict, without what needs a reference where there is none."""
    reward: Estimate
    rewards: dict[str, Estimate]
    """Each part of the reward."""
    kl: Estimate | None
    """None without a reference."""
    against_reference: Against | None
    pass_at: tuple[Share, ...]
    majority_at: tuple[Share, ...]
    best_of_n: tuple[Best, ...]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What one policy wrote, scored."""

    name: str
    groups: Sequence[ScoredGroup]
    kl: Tensor | None
    """[B] nats of each completion; None without a reference."""


def measured(
    one: Sampled, reference: Sequence[ScoredGroup] | None, *, attempts: Attempts, curve: bool, seed: int
) -> Measured:
    """The figures of one policy, beside the ``reference``'s completions where there are some, and with the ``curve`` of
    best-of-n where its completions differ."""
    groups = one.groups
    kl = None if one.kl is None else mean_interval(by_prompt(groups, one.kl.double().tolist()))
    mean_kl = 0.0 if one.kl is None else float(one.kl.mean())
    evaluation = evaluate_policy(groups, groups if reference is None else reference, kl=mean_kl)
    figures = evaluation.as_dict()
    if reference is None:
        figures = {name: value for name, value in figures.items() if name not in ("kl", "win_rate")}
    size = max(len(group.scores) for group in groups)
    sizes = sorted({*(2**i for i in range(size.bit_length())), size}) if curve and size > 1 else []
    return Measured(
        name=one.name,
        figures=figures,
        reward=mean_interval(known(mean_score(totals(group)) for group in groups)),
        rewards={
            name: mean_interval(
                known(mean_score([score.parts.get(name) for score in group.scores]) for group in groups)
            )
            for name in evaluation.rewards
        },
        kl=kl,
        against_reference=None if reference is None else against(groups, reference, seed=seed),
        pass_at=shares(groups, attempts.pass_at, partial(passed, above=attempts.pass_above)),
        majority_at=shares(groups, attempts.majority_at, partial(voted, above=attempts.pass_above)),
        best_of_n=tuple(best_of(groups, n) for n in sizes if any(len(scored(group)) >= n for group in groups)),
    )


def by_prompt(groups: Sequence[ScoredGroup], values: Sequence[float]) -> list[float]:
    """The mean of each prompt, of one value per completion."""
    left = iter(values)
    return [math.fsum(itertools.islice(left, len(group.scores))) / len(group.scores) for group in groups]


def totals(group: ScoredGroup) -> list[float | None]:
    return [score.total for score in group.scores]


def scored(group: ScoredGroup) -> list[int]:
    """The completions that a reward applies to."""
    return [i for i, total in enumerate(totals(group)) if total is not None]


def shares(
    groups: Sequence[ScoredGroup],
    ks: Sequence[int],
    share_of: Callable[[ScoredGroup, Sequence[int], Sequence[int]], list[float]],
) -> tuple[Share, ...]:
    """``share_of`` (group, its completions with a reward, ks) for each k, over the prompts that have k of them.

    Raises :class:`ConfigError` where no prompt has as many.
    """
    found: dict[int, list[float]] = {k: [] for k in ks}
    for group in groups:
        which = scored(group)
        possible = [k for k in found if k <= len(which)]
        for k, value in zip(possible, share_of(group, which, possible) if possible else [], strict=True):
            found[k].append(value)
    for k, values in found.items():
        if not values:
            raise ConfigError(f"no prompt has {k} completions that a reward applies to")
    return tuple(Share(k=k, share=share_interval(values)) for k, values in found.items())


def right(group: ScoredGroup, which: Sequence[int], above: float) -> list[bool]:
    return [total is not None and total > above for total in (group.scores[i].total for i in which)]


def passed(group: ScoredGroup, which: Sequence[int], ks: Sequence[int], *, above: float) -> list[float]:
    """pass@k."""
    return [pass_at_k(len(which), sum(right(group, which, above)), k) for k in ks]


def voted(group: ScoredGroup, which: Sequence[int], ks: Sequence[int], *, above: float) -> list[float]:
    """majority@k of the final answers."""
    answers = [final_answer(group.rollouts.completions[i].text) for i in which]
    return majority_at_k(answers, right(group, which, above), ks)


def best_of(groups: Sequence[ScoredGroup], n: int) -> Best:
    """Best-of-n, from all completions of each prompt."""
    reward: list[float] = []
    parts: dict[str, list[float]] = {}
    for group in groups:
        which = scored(group)
        if len(which) < n:
            continue
        scores = torch.tensor(known(totals(group)), dtype=torch.float64)
        weights = selection_weights(scores, n)
        reward.append(float(weights @ scores))
        for name in group.scores[which[0]].parts:
            values = known(group.scores[i].parts.get(name) for i in which)
            if len(values) == len(which):
                mean = float(weights @ torch.tensor(values, dtype=torch.float64))
                parts.setdefault(name, []).append(mean)
    return Best(
        n=n,
        kl_bound=best_of_n_kl(n),
        reward=mean_interval(reward),
        rewards={name: math.fsum(values) / len(values) for name, values in parts.items()},
    )


def against(own: Sequence[ScoredGroup], rival: Sequence[ScoredGroup], *, seed: int, level: float = LEVEL) -> Against:
    """``own`` beside ``rival``, sampled for the same prompts with the same seeds and scored by the same scorer.

    Raises :class:`RewardError` where no completion of both has a total.
    """
    rows = [(totals(a), totals(b)) for a, b in zip(own, rival, strict=True)]
    difference = bootstrap_mean(known(mean_difference(a, b) for a, b in rows), seed=seed, level=level)
    share = known(win_share(a, b, same_seeds=True) for a, b in rows)
    if not share:
        raise RewardError("no reward applies to both completions of any two that are compared")
    found = comparisons(own, rival)

    def at_equal_length(counts: Tensor) -> Tensor:
        return length_controlled_win_rate(found.wins, found.longer_by, counts[:, found.prompt] * found.weight)

    more: int | None = 0
    if not difference.excludes(0.0):
        more = more_completions(difference, per_prompt=max(len(a) for a, _ in rows), level=level)
    return Against(
        difference=difference,
        win_rate=bootstrap_mean(share, seed=seed, level=level),
        wilson=share_interval(share, level=level),
        equal_length=bootstrap(at_equal_length, len(share), seed=seed, level=level, width=len(found.wins)),
        longer_by=float(found.weight @ found.longer_by) / len(share),
        more_completions=more,
    )


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Completions of two policies for one prompt and seed, where both have a total."""

    wins: Tensor
    """[N]: 1 where the own total is higher, 1/2 where both are equal, else 0."""
    longer_by: Tensor
    """[N]: tokens by which the own completion is longer."""
    weight: Tensor
    """[N]: 1 over the comparisons of the prompt."""
    prompt: Tensor
    """[N] int64: the number of the prompt among those with a comparison."""


def comparisons(own: Sequence[ScoredGroup], rival: Sequence[ScoredGroup]) -> Comparisons:
    """All of them, prompt by prompt."""
    wins, longer_by, counts = [], [], []
    for a, b in zip(own, rival, strict=True):
        both = [i for i in scored(a) if b.scores[i].total is not None]
        own_totals, other_totals = totals(a), totals(b)
        wins += [win_share(own_totals[i : i + 1], other_totals[i : i + 1], same_seeds=True) for i in both]
        longer_by += [sum(a.rollouts.completions[i].mask) - sum(b.rollouts.completions[i].mask) for i in both]
        counts += [len(both)] if both else []
    number = torch.tensor(counts)
    return Comparisons(
        wins=torch.tensor(wins, dtype=torch.float64),
        longer_by=torch.tensor(longer_by, dtype=torch.float64),
        weight=(1.0 / number.double()).repeat_interleave(number),
        prompt=torch.arange(len(counts)).repeat_interleave(number),
    )


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Two policies; ``a`` has the higher mean."""

    a: str
    b: str
    found: Against


def pairs(models: Sequence[Sampled], *, seed: int) -> tuple[Beside, ...]:
    """Each two of the policies, the better first. The intervals of all pairs hold together with 95%."""
    level = level_of_pairs(len(models))
    found = []
    for one, other in itertools.combinations(models, 2):
        beside = against(one.groups, other.groups, seed=seed, level=level)
        if beside.difference.value < 0:
            one, other = other, one
            beside = against(one.groups, other.groups, seed=seed, level=level)
        found.append(Beside(a=one.name, b=other.name, found=beside))
    return tuple(found)


def level_of_pairs(models: int) -> float:
    """The level of each interval of a pair (:func:`tether.statistics.simultaneous`)."""
    return simultaneous(LEVEL, math.comb(models, 2))
