"""A comparison in words and in the cells of its tables, for terminals and for pages alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tether.durations import in_words
from tether.report.comparison import NONE, Comparison, Pair, Standing
from tether.report.held_out import SCORE
from tether.statistics import LEVEL, POWER, Estimate

SAME_KL = 0.05
"""Nats below which two distances from the reference are called the same."""
MANY_PAIRS = 6
"""Beyond as many pairs, the verdict speaks of those with the best policy alone."""


def called(figure: str) -> str:
    """What a figure is called in a sentence and over a column."""
    return "reward" if figure == SCORE else figure.removeprefix("rewards/")


def digits_for(half_width: float) -> int:
    """Decimals that show two digits of an interval's half-width; 3 without one."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(half_width))))


def plus_minus(estimate: Estimate, *, sign: bool = False) -> str:
    """``0.446 ± 0.049``; the mean alone where there is no interval."""
    half = estimate.half_width
    digits = digits_for(half)
    shown = f"{estimate.value:{'+' if sign else ''}.{digits}f}"
    return f"{shown} ± {half:.{digits}f}" if math.isfinite(half) else shown


def percent(estimate: Estimate) -> str:
    """``75% (69–80)``"""
    return percent_of(estimate.value, estimate.low, estimate.high)


def percent_of(value: float, low: float, high: float) -> str:
    """:func:`percent` of a share and the ends of its interval."""
    return f"{value:.0%} ({100 * low:.0f}–{100 * high:.0f})"


def rounded(count: int) -> int:
    """A count to two digits.

    >>> [rounded(n) for n in (7, 432, 6841)]
    [7, 430, 6800]
    """
    return round(count, 2 - len(str(count))) if count >= 100 else count


STANDINGS = ("reward", "vs reference", "wins", "KL", "tokens", "time")
"""The columns behind the name; the first is called by its figure."""


def standing_cells(one: Standing) -> list[str]:
    """The row of one policy. ``*`` marks a reward that is not from held-out prompts."""
    mark = " *" if one.source == "training samples" else ""
    return [
        one.name,
        NONE if one.reward is None else f"{plus_minus(one.reward)}{mark}",
        NONE if one.against_reference is None else plus_minus(one.against_reference, sign=True),
        NONE if one.wins is None else percent(one.wins),
        NONE if one.kl is None else f"{one.kl:.1f}",
        NONE if one.length is None else f"{one.length:.0f}",
        NONE if not one.seconds else in_words(one.seconds),
    ]


PAIRS = ("higher", "than", "by", "wins", "KL", "told apart")


def pair_cells(one: Pair) -> list[str]:
    """The row of one pair."""
    return [
        one.a,
        one.b,
        plus_minus(one.difference),
        percent(one.wins),
        NONE if one.kl is None else f"{one.kl:+.1f}",
        "yes" if one.more_completions == 0 else "no",
    ]


def verdicts(found: Comparison) -> list[str]:
    """One sentence per pair, best first; of many, per pair with the best policy. Of a single run, one about it and its
    reference."""
    pairs = found.pairs
    if len(pairs) > MANY_PAIRS:
        pairs = tuple(pair for pair in pairs if pair.a == found.pairs[0].a)
    said = [pair_verdict(pair) for pair in pairs]
    if len(found.standings) == 1 and (one := found.standings[0]).against_reference is not None:
        said.append(own_verdict(one, one.against_reference))
    return said


def pair_verdict(pair: Pair) -> str:
    """``B is better than A by 0.110 ± 0.050 at 2.0 nats more.``"""
    size = f"{plus_minus(pair.difference)}{at_kl(pair.kl)}"
    if pair.more_completions == 0 and pair.seed_alone:
        return (
            f"{pair.a} and {pair.b} differ in the seed alone, and {pair.a} is higher by {size}: training varies by as "
            "much, and neither is a better method."
        )
    if pair.more_completions == 0:
        return f"{pair.a} is better than {pair.b} by {size}."
    said = f"{pair.a} and {pair.b} cannot be told apart ({pair.a} is higher by {size}): "
    if pair.more_completions is None:
        return f"{said}no number of completions in reach would do."
    return f"{said}about {rounded(pair.more_completions)} more completions of each would do."


def at_kl(kl: float | None) -> str:
    """How much further one policy is from the reference than the other."""
    if kl is None:
        return ""
    return " at the same KL" if abs(kl) < SAME_KL else f" at {abs(kl):.1f} nats {'more' if kl > 0 else 'less'}"


def own_verdict(one: Standing, change: Estimate) -> str:
    """What a run gained over its reference."""
    kl = "" if one.kl is None else f" at {one.kl:.1f} nats from it"
    if not change.excludes(0.0):
        return f"{one.name} cannot be told from its reference (difference {plus_minus(change, sign=True)}{kl})."
    if change.value > 0:
        return f"{one.name} is better than its reference by {plus_minus(change)}{kl}."
    loss = replace(change, value=-change.value, low=-change.high, high=-change.low)
    return f"{one.name} is worse than its reference by {plus_minus(loss)}{kl}."


def notes(found: Comparison) -> list[str]:
    """What has to be known to read the figures: how they are computed, and what they do not say."""
    by_source = {one.source for one in found.standings}
    said = []
    if "held-out completions" in by_source:
        prompts = sorted({one.prompts for one in found.standings if one.prompts})
        counted = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
        said.append(
            f"Means over {counted} held-out prompts, with the {LEVEL:.0%} interval over prompts (Student's t; for wins "
            "Wilson's). A win is a higher score for the same prompt; ties count half."
        )
    if len(found.pairs) > 1:
        said.append(
            f"The intervals of the {len(found.pairs)} differences between runs hold together with {LEVEL:.0%} "
            f"(Bonferroni: {100 * found.level:.1f}% each)."
        )
    if any(pair.more_completions for pair in found.pairs):
        said.append(
            "More completions: on further prompts with as many each, for a chance of "
            f"{POWER:.0%}, if the true difference and its spread are the ones found here."
        )
    if found.pairs or any(one.against_reference is not None for one in found.standings):
        said.append("The intervals cover prompts and sampling, not training: another seed trains another policy.")
    for name in found.chosen_on_held_out:
        said.append(f"The step of {name} was chosen on these prompts, so its figure is optimistic.")
    return [*said, *unheld(found), *(f"{why}." for why in found.excluded)]


def unheld(found: Comparison) -> list[str]:
    """Which figures are not from held-out completions."""
    training = [one.name for one in found.standings if one.source == "training samples"]
    summed = [one.name for one in found.standings if one.source == "held-out summary"]
    said = []
    if training:
        said.append(
            f"* {', '.join(training)}: not held-out, but the mean of the last fifth of training, on prompts that were "
            "trained on. It has no interval; train with --eval-prompts."
        )
    if summed:
        said.append(f"{', '.join(summed)}: from summary.json, without the completions that a paired comparison needs.")
    return said


def headline(found: Comparison, others: Sequence[str]) -> str:
    """What the policies are compared by."""
    watched = "" if found.trained_on else ", which none was trained on"
    also = [name.removeprefix("rewards/") for name in others if name != found.figure]
    return f"By {called(found.figure)}{watched}." + (f" --by takes {', '.join(also)} too." if also else "")
