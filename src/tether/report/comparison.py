"""What several policies are worth beside each other: figures, paired differences, and what may not be compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tether.errors import ConfigError
from tether.report.held_out import SCORE, Candidate, HeldOut, Scores, differences, means, win_shares
from tether.report.view import RunView
from tether.runtime.changes import OF_THE_PROCESS
from tether.statistics import LEVEL, Estimate, mean_interval, prompts_needed, share_interval, simultaneous

Source = Literal["held-out completions", "held-out summary", "training samples", "nothing"]
TAIL = 0.2
"""Share of the rows of ``metrics.jsonl``, the newest ones, that stand for a run without held-out figures."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What one policy is worth. Figures that are not known are None."""

    name: str
    source: Source
    """What the reward is computed from."""
    reward: Estimate | None
    """By :attr:`Comparison.figure`."""
    against_reference: Estimate | None
    """The paired difference to the policy's reference."""
    wins: Estimate | None
    """Share of completions that score above the reference's."""
    kl: float | None
    """Nats per completion, to the reference."""
    length: float | None
    """Tokens per completion."""
    seconds: float | None
    prompts: int
    completions: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies compared prompt by prompt; ``a`` has the higher mean."""

    a: str
    b: str
    difference: Estimate
    """Of ``a`` minus ``b``, over the prompts that both have. Its interval holds together with those of the other pairs
    (:func:`tether.statistics.simultaneous`)."""
    wins: Estimate
    """Share of completions of ``a`` that score above those of ``b``; its interval is as that of the difference."""
    kl: float | None
    """How much further ``a`` is from the reference, in nats; None where it is another reference, or not known."""
    more_completions: int | None
    """Completions of each, on further prompts, with which such a difference would be told from 0; 0 where it is, None
    where no number in reach would do."""
    seed_alone: bool
    """Whether the seed is the only option in which the two runs differ."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that is known about some policies beside each other."""

    figure: str
    """What they are compared by: ``score`` or ``rewards/NAME``."""
    trained_on: bool
    """Whether some policy was trained to raise it."""
    standings: tuple[Standing, ...]
    """In the order in which the runs were given."""
    pairs: tuple[Pair, ...]
    """Best first."""
    excluded: tuple[str, ...]
    """What is not compared, and why."""
    chosen_on_held_out: tuple[str, ...]
    """The policies whose step was chosen on the held-out prompts that they are compared on."""

    @property
    def level(self) -> float:
        """The level of each interval of a pair."""
        return simultaneous(LEVEL, len(self.pairs))


def compare(candidates: Sequence[Candidate], *, by: str | None = None) -> Comparison:
    """The candidates by the figure ``by``, or :func:`chosen_figure`.

    Raises :class:`ConfigError` where no candidate has that figure.
    """
    figure = chosen_figure(candidates) if by is None else named_figure(candidates, by)
    held_out = [one for one in candidates if not lacking(one, figure)]
    both = [(a, b, why_not(a, b, figure)) for a, b in itertools.combinations(held_out, 2)]
    reasons = [why for *_, why in both]
    level = simultaneous(LEVEL, sum(not why for *_, why in both))
    pairs = [pair(a, b, figure, level=level) for a, b, why in both if not why]
    standings = tuple(standing(one, figure) for one in candidates)
    rank = {one.name: -one.reward.value for one in standings if one.reward}
    return Comparison(
        figure=figure,
        trained_on=any(figure in one.trained_on for one in candidates),
        standings=standings,
        pairs=tuple(sorted(pairs, key=lambda pair: (rank[pair.a], rank[pair.b]))),
        excluded=(*lacks(candidates, figure), *filter(None, reasons)),
        chosen_on_held_out=tuple(one.name for one in held_out if one.chosen_on_held_out),
    )


def figures_of(candidates: Sequence[Candidate]) -> list[str]:
    """The figures that at least one candidate has."""
    names = dict.fromkeys(name for one in candidates for name in one.rewards)
    return [name for name in names if any(one.has(name) for one in candidates)]


def distinct_figures(candidates: Sequence[Candidate]) -> list[str]:
    """:func:`figures_of` without rewards that are the total themselves, being the only one of weight 1."""

    def is_total(figure: str) -> bool:
        return all(one.rewards.get(SCORE) == f"1 * {one.rewards[figure]}" for one in candidates if one.has(figure))

    return [figure for figure in figures_of(candidates) if figure == SCORE or not is_total(figure)]


def chosen_figure(candidates: Sequence[Candidate]) -> str:
    """What the most candidates can be compared by; of several, the first that none was trained on, then the total."""

    def preference(figure: str) -> tuple[int, bool, bool]:
        known = [one for one in candidates if one.has(figure)]
        alike = max(sum(one.rewards[figure] == other.rewards[figure] for one in known) for other in known)
        return alike, not any(figure in one.trained_on for one in known), figure == SCORE

    return max(figures_of(candidates), key=preference, default=SCORE)


def named_figure(candidates: Sequence[Candidate], name: str) -> str:
    """The figure that a person calls ``name``: that of ``rewards/NAME``, or the total."""
    known = figures_of(candidates)
    short = {figure.removeprefix("rewards/"): figure for figure in known} | {figure: figure for figure in known}
    short |= {"reward": SCORE} if SCORE in known and "reward" not in short else {}
    if name not in short:
        names = ", ".join(figure.removeprefix("rewards/") for figure in known) or "none"
        raise ConfigError(f"no run has the figure {name!r}", hint=f"there are: {names}")
    return short[name]


def lacking(one: Candidate, figure: str) -> str:
    """Why a candidate can be compared with no other; "" where it can."""
    if one.policy is None:
        return one.unfinished or "no held-out completions"
    return "" if one.has(figure) else f"no {figure} on held-out prompts"


def lacks(candidates: Sequence[Candidate], figure: str) -> list[str]:
    """Which candidates cannot be compared with others, by what they lack."""
    if len(candidates) == 1:
        (one,) = candidates
        return [f"{one.name}: {one.unfinished}"] if one.unfinished else []
    names: dict[str, list[str]] = {}
    for one in candidates:
        if why := lacking(one, figure):
            names.setdefault(why, []).append(one.name)
    return [f"{', '.join(named)}: {why}, so not compared with the others" for why, named in names.items()]


def why_not(a: Candidate, b: Candidate, figure: str) -> str:
    """Why two candidates that lack nothing cannot be compared prompt by prompt; "" where they can."""
    assert a.policy is not None
    assert b.policy is not None
    names = f"{a.name} and {b.name} are not compared"
    if a.rewards[figure] != b.rewards[figure]:
        return f"{names}: {figure} is {a.rewards[figure]} in one and {b.rewards[figure]} in the other"
    if len(differences(a.policy, b.policy, figure)) < 2:
        return f"{names}: they share fewer than two held-out prompts with a {figure}"
    return ""


def pair(a: Candidate, b: Candidate, figure: str, *, level: float) -> Pair:
    """Two candidates that can be compared (:func:`why_not`), the better one first."""
    assert a.policy is not None
    assert b.policy is not None
    found = mean_interval(differences(a.policy, b.policy, figure), level=level)
    if found.value < 0:
        return pair(b, a, figure, level=level)
    more: int | None = 0
    if not found.excludes(0.0):
        each = math.ceil(min(one.completions / len(one.scores[figure]) for one in (a.policy, b.policy)))
        more = more_completions(found, per_prompt=each, level=level)
    kl_a, kl_b = kl_of(a), kl_of(b)
    return Pair(
        a=a.name,
        b=b.name,
        difference=found,
        wins=share_interval(win_shares(a.policy, b.policy, figure), level=level),
        kl=kl_a - kl_b if kl_a is not None and kl_b is not None and a.base == b.base else None,
        more_completions=more,
        seed_alone=[name for name, *_ in differing_options([v for v in (a.view, b.view) if v is not None])] == ["seed"],
    )


def more_completions(difference: Estimate, *, per_prompt: int, level: float) -> int | None:
    """Completions of each of two policies on further prompts, ``per_prompt`` on each, with which such a difference
    would be told from 0 (:func:`tether.statistics.prompts_needed`)."""
    prompts = prompts_needed(difference, level=level)
    return None if prompts is None else max(0, prompts - difference.prompts) * per_prompt


def kl_of(one: Candidate) -> float | None:
    """Nats per completion on held-out prompts, or in the newest training steps; None where neither is known."""
    held_out = one.policy.kl if one.policy is not None else {}
    return known_figure(one, one.kl, held_out, evaluated="kl", metric="kl")


def length_of(one: Candidate) -> float | None:
    """Tokens per completion, as :func:`kl_of`."""
    held_out = one.policy.length if one.policy is not None else {}
    return known_figure(one, one.length, held_out, evaluated="mean_length", metric="completions/mean_length")


def known_figure(one: Candidate, given: float | None, held_out: Scores, *, evaluated: str, metric: str) -> float | None:
    """The first that is known: what is ``given``, the mean over the ``held_out`` completions, the figure ``evaluated``
    of the summary, or the ``metric`` of the newest training steps."""
    if given is not None:
        return given
    if held_out:
        return mean_interval(means(held_out)).value
    if one.view is not None and (found := one.view.evaluation.get("policy")):
        return found[evaluated]
    return tail_mean(one.view, metric)


def tail_mean(view: RunView | None, metric: str) -> float | None:
    """The mean of a metric over the newest rows that have it, :data:`TAIL` of them; None without any."""
    values = [row[metric] for row in view.rows if metric in row] if view is not None else []
    newest = values[-max(1, round(TAIL * len(values))) :]
    return math.fsum(newest) / len(newest) if newest else None


def standing(one: Candidate, figure: str) -> Standing:
    """What is known of one candidate."""
    source, reward = reward_of(one, figure)
    against = wins = None
    if one.policy is not None and one.reference is not None and source == "held-out completions":
        changes = differences(one.policy, one.reference, figure)
        against = mean_interval(changes) if changes else None
        shares = win_shares(one.policy, one.reference, figure)
        wins = share_interval(shares) if shares else None
    return Standing(
        name=one.name,
        source=source,
        reward=reward,
        against_reference=against,
        wins=wins,
        kl=kl_of(one),
        length=length_of(one),
        seconds=one.seconds,
        prompts=len(one.policy.scores[figure]) if one.policy is not None and one.has(figure) else 0,
        completions=one.policy.completions if one.policy is not None else 0,
    )


def reward_of(one: Candidate, figure: str) -> tuple[Source, Estimate | None]:
    """The figure of a candidate, from the best that it has."""
    if one.policy is not None and one.has(figure):
        return "held-out completions", held_out_mean(one.policy, figure)
    if one.view is not None and figure == SCORE and (found := one.view.evaluation.get("policy")):
        value, half = found["reward"], found["reward_ci95"]
        return "held-out summary", Estimate(value=value, low=value - half, high=value + half, prompts=0, std=math.nan)
    mean = tail_mean(one.view, one.metrics.get(figure, ""))
    if mean is None:
        return "nothing", None
    return "training samples", Estimate(value=mean, low=-math.inf, high=math.inf, prompts=0, std=math.nan)


def held_out_mean(model: HeldOut, figure: str) -> Estimate | None:
    """The mean over prompts; None where the figure applies to no completion."""
    found = means(model.scores[figure])
    return mean_interval(found) if found else None


def differing_options(views: Sequence[RunView]) -> list[list[str]]:
    """One row per option of the run that is not the same in all of them: its name, and its value in each, as a person
    writes it. Options of the process (:data:`tether.runtime.changes.OF_THE_PROCESS`) say nothing about the result."""
    names = dict.fromkeys(name for view in views for name in view.config if name not in OF_THE_PROCESS)
    rows = [
        [name, *(as_written(view.config[name]) if name in view.config else NONE for view in views)] for name in names
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


NONE = "–"
"""Stands for an option or a figure that a run does not have."""


def as_written(value: object) -> str:
    """The value of an option as it is written on a command line or in a file.

    >>> [as_written(value) for value in (None, True, 1e-05, ["a", "b"], [])]
    ['none', 'true', '1e-05', 'a b', 'none']
    """
    if isinstance(value, list):
        return " ".join(map(as_written, value)) or "none"
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
