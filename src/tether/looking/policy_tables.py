"""The evaluation of policies as JSON, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tether.looking.policy_figures import Against, Beside, Measured, level_of_pairs
from tether.looking.terminal import grid
from tether.report.comparison import NONE, Pair
from tether.report.verdict import pair_cells, pair_verdict, percent, plus_minus
from tether.statistics import LEVEL, POWER, Estimate
from tether.untrusted import printable

ENDS = (0.1, 0.9)
"""Win rates beyond which the bootstrap's intervals are too narrow."""


def as_data(models: Sequence[Measured], pairs: Sequence[Beside], *, reference: str | None) -> dict[str, Any]:
    """One policy as one object; several as a list of such, with their pairs."""
    if len(models) == 1:
        return policy_data(models[0], reference)
    return {
        "reference": reference,
        "models": [policy_data(one, reference) for one in models],
        "comparison_level": level_of_pairs(len(models)),
        "comparisons": [{"a": pair.a, "b": pair.b, **against_data(pair.found)} for pair in pairs],
    }


def policy_data(one: Measured, reference: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"model": one.name, "reference": reference, **one.figures}
    found["rewards_ci95"] = {name: half_width(estimate) for name, estimate in one.rewards.items()}
    if one.kl is not None:
        found["kl_ci95"] = half_width(one.kl)
    if one.against_reference is not None:
        found["against_reference"] = against_data(one.against_reference)
    for name, shares in (("pass_at", one.pass_at), ("majority_at", one.majority_at)):
        if shares:
            found[name] = [{"k": each.k, **ends(each.share), "prompts": each.share.prompts} for each in shares]
    if one.best_of_n:
        found["best_of_n"] = [
            {
                "n": best.n,
                "kl_bound": best.kl_bound,
                "reward": best.reward.value,
                "reward_ci95": half_width(best.reward),
                "rewards": best.rewards,
                "prompts": best.reward.prompts,
            }
            for best in one.best_of_n
        ]
    return found


def against_data(found: Against) -> dict[str, Any]:
    return {
        "difference": ends(found.difference),
        "win_rate": ends(found.win_rate),
        "win_rate_wilson": ends(found.wilson),
        "length_controlled_win_rate": ends(found.equal_length),
        "longer_by": found.longer_by,
        "more_completions": found.more_completions,
        "prompts": found.win_rate.prompts,
    }


def ends(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def half_width(estimate: Estimate) -> float:
    """0 where one prompt leaves no interval, as ``reward_ci95``."""
    return estimate.half_width if estimate.prompts > 1 else 0.0


def in_full(models: Sequence[Measured], pairs: Sequence[Beside], *, reference: str | None) -> list[RenderableType]:
    """The tables, the verdicts, and what has to be known to read them."""
    short = labels([one.name for one in models])
    models = [replace(one, name=short[one.name]) for one in models]
    pairs = [replace(pair, a=short[pair.a], b=short[pair.b]) for pair in pairs]
    parts: list[RenderableType] = [standings(models, reference)]
    if any(one.reward != only for one in models for only in one.rewards.values()):
        parts.append(part_table(models))
    if models[0].pass_at or models[0].majority_at:
        parts.append(attempt_table(models))
    if any(one.best_of_n for one in models):
        parts.append(best_table(models))
    if pairs:
        header = ["higher", "than", "by", "wins", "equal length", "told apart"]
        parts.append(grid(header, [beside_cells(pair) for pair in pairs], left=2))
    parts += [Text(printable(pair_verdict(as_pair(pair)))) for pair in pairs]
    return [*parts, Text(), *(Text(printable(line), style="dim") for line in notes(models, pairs))]


def labels(names: Sequence[str]) -> dict[str, str]:
    """What each policy is called in a table: by its directory, or that of its run, where those differ; else in full."""
    paths = [Path(name) for name in names]
    short = [path.parent.name if path.name == "model" else path.name for path in paths]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))


def standings(models: Sequence[Measured], reference: str | None) -> RenderableType:
    header, rows = ["model", "reward"], [[one.name, plus_minus(one.reward)] for one in models]
    if reference is not None:
        header += ["vs reference", "wins", "equal length", "KL"]
        for row, one in zip(rows, models, strict=True):
            row += reference_cells(one)
    for row, one in zip(rows, models, strict=True):
        row.append(f"{one.figures['mean_length']:.0f}")
    return grid([*header, "tokens"], rows)


def reference_cells(one: Measured) -> list[str]:
    found = one.against_reference
    assert found is not None
    assert one.kl is not None
    return [
        plus_minus(found.difference, sign=True),
        percent(found.win_rate),
        percent(found.equal_length),
        f"{one.kl.value:.1f}",
    ]


def part_table(models: Sequence[Measured]) -> RenderableType:
    names = dict.fromkeys(name for one in models for name in one.rewards)
    rows = [
        [name, *(plus_minus(one.rewards[name]) if name in one.rewards else NONE for one in models)] for name in names
    ]
    return grid(["part of the reward", *(one.name for one in models)], rows)


def attempt_table(models: Sequence[Measured]) -> RenderableType:
    first = models[0]
    header = [*(f"pass@{each.k}" for each in first.pass_at), *(f"majority@{each.k}" for each in first.majority_at)]
    return grid(
        ["model", *header],
        [[one.name, *(percent(each.share) for each in (*one.pass_at, *one.majority_at))] for one in models],
    )


def best_table(models: Sequence[Measured]) -> RenderableType:
    """A column per policy; of a single one whose reward has several parts, one per part."""
    curves = [{best.n: best for best in one.best_of_n} for one in models]
    sizes = sorted({n: best.kl_bound for curve in curves for n, best in curve.items()}.items())
    rows = [
        [f"best of {n}", f"{bound:.2f}", *(plus_minus(curve[n].reward) if n in curve else NONE for curve in curves)]
        for n, bound in sizes
    ]
    header = ["", "KL at most", *(one.name for one in models)]
    if len(models) == 1 and len(models[0].rewards) > 1:
        names = list(models[0].rewards)
        header = ["", "KL at most", "reward", *names]
        for row, (n, _) in zip(rows, sizes, strict=True):
            means = curves[0][n].rewards
            row += [f"{means[name]:.3f}" if name in means else NONE for name in names]
    return grid(header, rows)


def as_pair(pair: Beside) -> Pair:
    """As ``tether compare`` has it."""
    return Pair(
        a=pair.a,
        b=pair.b,
        difference=pair.found.difference,
        wins=pair.found.win_rate,
        kl=None,
        more_completions=pair.found.more_completions,
        seed_alone=False,
    )


def beside_cells(pair: Beside) -> list[str]:
    a, b, difference, wins, _, told = pair_cells(as_pair(pair))
    return [a, b, difference, wins, percent(pair.found.equal_length), told]


def notes(models: Sequence[Measured], pairs: Sequence[Beside]) -> list[str]:
    """What has to be known to read the figures."""
    first = models[0].figures
    said = [
        f"{first['prompts']} prompts, {first['completions']} completions of each model. Means over prompts, with "
        f"{LEVEL:.0%} intervals over prompts (Student's t; shares Wilson's; differences and wins by bootstrap)."
    ]
    found = [one.against_reference for one in models if one.against_reference] + [pair.found for pair in pairs]
    if found:
        said.append(
            "A win is a higher reward for the same prompt and seed; ties count half. Equal length: the win rate that a "
            "logistic regression gives where both write equally many tokens."
        )
    said += [
        f"A win rate of {one.win_rate.value:.0%} is so near the end that its bootstrap interval is too narrow; "
        f"Wilson's is {100 * one.wilson.low:.0f}–{100 * one.wilson.high:.0f}%."
        for one in found
        if not ENDS[0] < one.win_rate.value < ENDS[1]
    ]
    if len(pairs) > 1:
        said.append(
            f"The intervals of the {len(pairs)} pairs hold together with {LEVEL:.0%} "
            f"(Bonferroni: {100 * level_of_pairs(len(models)):.1f}% each)."
        )
    if any(pair.found.more_completions for pair in pairs):
        said.append(
            f"More completions: on further prompts with as many each, for a chance of {POWER:.0%}, if the true "
            "difference and its spread are the ones found here."
        )
    if any(one.best_of_n for one in models):
        said.append("Best of n: KL to the model that is sampled from, which is an upper bound.")
    return said
