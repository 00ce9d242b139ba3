"""What ``tether eval`` says of reward models: figures, where each is right, and which of several is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from tether.algorithms.pair_breakdown import (
    Part,
    accuracy_difference,
    length_bins,
    length_correlation,
    length_correlation_in_pairs,
    length_sides,
    part,
    value_groups,
)
from tether.algorithms.pair_evaluation import Evaluation, evaluation_of, prompts_of, sign_share
from tether.algorithms.reward_model import score_pairs
from tether.config import SampleOptions
from tether.data.checks import DataReport
from tether.data.reading import Row
from tether.data.records import load_pairs
from tether.errors import ConfigError, DataError
from tether.looking.policy_tables import ends, labels
from tether.looking.terminal import grid
from tether.models.reward import TOKEN_BUDGET, load_reward_model
from tether.report.comparison import NONE
from tether.report.verdict import percent_of, plus_minus
from tether.statistics import LEVEL, Estimate, simultaneous
from tether.training.loading import placing, reader, set_matmul_dtype, tell_unpacked
from tether.types import PreferencePair
from tether.untrusted import printable, shortened

NOT_STATED = "(none)"
"""Stands for the value of a row that does not have the column."""
LONGEST_VALUE = 60
"""Characters of a value in a table."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The pairs of a file as one reward model reads and scores them."""

    name: str
    pairs: Sequence[PreferencePair]
    rows: Sequence[Row]
    """The row that each pair was made from."""
    values: Sequence[object]
    """The value of each row in a column, where one is given."""
    scores: Tensor
    """[2, N]: of the chosen sides, then of the rejected ones."""

    @property
    def lengths(self) -> Tensor:
        """[2, N] tokens."""
        sides = [[len(one.chosen_ids) for one in self.pairs], [len(one.rejected_ids) for one in self.pairs]]
        return torch.tensor(sides)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One reward model."""

    name: str
    evaluation: Evaluation
    by_length: Sequence[Part]
    """By how much longer the chosen side is."""
    by_side: Sequence[Part]
    """The pairs whose chosen side is shorter, and those where it is longer."""
    by_value: Sequence[Part]
    """By the value of a column, where one is given."""
    length_correlation: Estimate
    length_correlation_in_pairs: Estimate


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Two reward models on the same pairs; ``a`` is right more often."""

    a: str
    b: str
    pairs: int
    difference: Estimate
    """Of their accuracies."""


def judged(name: str, source: str, options: SampleOptions, *, by: str | None) -> Judged:
    """Read the pairs of ``source`` as the reward model ``name`` does, with the column ``by`` if one is given, and score
    them."""
    device, report = options.device, DataReport()
    judge, tokenizer = load_reward_model(name, **placing(device))
    tell_unpacked(judge)
    set_matmul_dtype(device.matmul_dtype, judge)
    pairs = reader(load_pairs, judge, tokenizer, options.data, report)(source)
    report.tell()
    rows = [report.origin(pair)[0] for pair in pairs]
    values = [] if by is None else column(rows, by)
    scores = score_pairs(judge, pairs, token_budget=TOKEN_BUDGET)
    return Judged(name=name, pairs=pairs, rows=rows, values=values, scores=scores)


def measured(one: Judged, *, seed: int) -> Measured:
    """The figures of one reward model."""
    prompts = prompts_of(one.pairs)
    right = sign_share(one.scores[0] - one.scores[1]).tolist()
    longer_by = (one.lengths[0] - one.lengths[1]).tolist()
    return Measured(
        name=one.name,
        evaluation=evaluation_of(one.pairs, one.scores),
        by_length=[part(name, right, prompts, inside) for name, inside in length_bins(longer_by)],
        by_side=[part(name, right, prompts, inside) for name, inside in length_sides(longer_by)],
        by_value=[part(name, right, prompts, inside) for name, inside in value_groups(one.values)],
        length_correlation=length_correlation(one.scores, one.lengths, prompts, seed=seed),
        length_correlation_in_pairs=length_correlation_in_pairs(one.scores, one.lengths, prompts, seed=seed),
    )


def column(rows: Sequence[Row], name: str) -> list[object]:
    """The value of each row. Raises :class:`ConfigError` where no row has the column."""
    if not any(name in row.values for row in rows):
        names = ", ".join(dict.fromkeys(map(str, rows[0].values)))
        raise ConfigError(f"no row has the column {name!r}", where="--by", hint=f"the first row has {names}")
    return [NOT_STATED if (value := row.values.get(name)) is None else value for row in rows]


def comparisons(models: Sequence[Judged], *, seed: int) -> list[Beside]:
    """Each two of the models on the rows that both read. The intervals hold together with 95%.

    Raises :class:`DataError` where two have no row in common.
    """
    level = level_of(len(models))
    found = []
    for one, other in itertools.combinations(models, 2):
        places = {row.where: i for i, row in enumerate(other.rows)}
        shared = [(i, places[row.where]) for i, row in enumerate(one.rows) if row.where in places]
        if not shared:
            raise DataError(f"{one.name} and {other.name} can read no row both")
        mine, theirs = (torch.tensor(indices) for indices in zip(*shared, strict=True))
        own, rival = (one.scores[0] - one.scores[1])[mine], (other.scores[0] - other.scores[1])[theirs]
        all_prompts = prompts_of(one.pairs)
        prompts = [all_prompts[i] for i, _ in shared]
        difference = accuracy_difference(own, rival, prompts, seed=seed, level=level)
        a, b = one.name, other.name
        if difference.value < 0:
            a, b, difference = b, a, turned(difference)
        found.append(Beside(a=a, b=b, pairs=len(shared), difference=difference))
    return found


def turned(estimate: Estimate) -> Estimate:
    """The difference the other way round."""
    return replace(estimate, value=-estimate.value, low=-estimate.high, high=-estimate.low)


def level_of(models: int) -> float:
    """The level of each interval of a comparison (:func:`tether.statistics.simultaneous`)."""
    return simultaneous(LEVEL, models * (models - 1) // 2)


# ------------------------------------------------------------------------------------------------ as JSON


def as_data(models: Sequence[Measured], beside: Sequence[Beside], *, by: str | None) -> dict[str, Any]:
    """One reward model as one object; several as a list of such, with their comparisons."""
    if len(models) == 1:
        return judge_data(models[0], by)
    return {
        "reward_models": [judge_data(one, by) for one in models],
        "comparison_level": level_of(len(models)),
        "comparisons": [
            {"a": one.a, "b": one.b, "pairs": one.pairs, "difference": ends(one.difference)} for one in beside
        ],
    }


def judge_data(one: Measured, by: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"reward_model": one.name, **vars(one.evaluation)}
    found["by_length"] = [part_data(each, "chosen") for each in one.by_length]
    found["by_side"] = [part_data(each, "chosen") for each in one.by_side]
    found["length_correlation"] = ends(one.length_correlation)
    found["length_correlation_in_pairs"] = ends(one.length_correlation_in_pairs)
    if by is not None:
        found["by"] = {"column": by, "values": [part_data(each, "value") for each in one.by_value]}
    return found


def part_data(one: Part, name: str) -> dict[str, Any]:
    accuracy = {"accuracy": one.accuracy, "accuracy_low": one.low, "accuracy_high": one.high}
    return {name: one.name, "pairs": one.pairs, **accuracy}


# ------------------------------------------------------------------------------------------------ on a terminal


def in_full(models: Sequence[Measured], beside: Sequence[Beside], *, by: str | None) -> list[RenderableType]:
    """The tables, and what has to be known to read them."""
    short = labels([one.name for one in models])
    parts: list[RenderableType] = [figure_table(models, [short[one.name] for one in models])]
    if len(models) == 1:
        parts += [part_table("chosen side, in tokens", models[0].by_length), reliability(models[0].evaluation)]
    if by is not None:
        parts += [part_table(by if len(models) == 1 else f"{by}: {short[one.name]}", one.by_value) for one in models]
    if beside:
        rows = [
            [short[one.a], short[one.b], plus_minus(one.difference), "yes" if one.difference.excludes(0.0) else "no"]
            for one in beside
        ]
        parts.append(grid(["right more often", "than", "by", "told apart"], rows, left=2))
    return [*parts, Text(), *(Text(printable(line), style="dim") for line in notes(models, beside))]


def figure_table(models: Sequence[Measured], names: Sequence[str]) -> RenderableType:
    found = [one.evaluation for one in models]
    rows = [
        ["pairs", *(str(one.pairs) for one in found)],
        ["prompts", *(str(one.prompts) for one in found)],
        ["accuracy", *(percent_of(one.accuracy, one.accuracy_low, one.accuracy_high) for one in found)],
        *side_rows(models),
        ["accuracy of 'the longer side wins'", *(f"{one.longer_wins:.0%}" for one in found)],
        ["prefers the longer side in", *(f"{one.prefers_longer:.0%}" for one in found)],
        ["correlation of score and length", *(correlation(one.length_correlation) for one in models)],
        ["the same within pairs", *(correlation(one.length_correlation_in_pairs) for one in models)],
        ["log loss, nats (guessing: 0.693)", *(f"{one.log_loss:.3f}" for one in found)],
        ["calibration error", *(f"{one.calibration_error:.3f}" for one in found)],
    ]
    return grid(["", *names], rows)


def correlation(estimate: Estimate) -> str:
    return NONE if math.isnan(estimate.value) else plus_minus(estimate, sign=True)


def side_rows(models: Sequence[Measured]) -> list[list[str]]:
    rows = []
    for side in ("longer", "shorter"):
        cells = [{one.name: percent_of(one.accuracy, one.low, one.high) for one in model.by_side} for model in models]
        rows.append([f"... where the chosen side is {side}", *(each.get(side, NONE) for each in cells)])
    return rows


def part_table(title: str, parts: Sequence[Part]) -> RenderableType:
    rows = [
        [shortened(one.name, LONGEST_VALUE), str(one.pairs), percent_of(one.accuracy, one.low, one.high)]
        for one in parts
    ]
    return grid([title, "pairs", "accuracy"], rows)


def reliability(found: Evaluation) -> RenderableType:
    rows = [[f"{confidence:.0%}", str(count), f"{accuracy:.0%}"] for confidence, accuracy, count in found.bins]
    return grid(["mean confidence of the bin", "pairs", "accuracy"], rows)


def notes(models: Sequence[Measured], beside: Sequence[Beside]) -> list[str]:
    """What has to be known to read the figures."""
    said = [
        f"{LEVEL:.0%} intervals over prompts: Wilson's of accuracies; of correlations and differences by bootstrap. "
        "Confidence is sigmoid(|margin|). A tie counts half."
    ]
    if len(models) > 1:
        said.append("Lengths are in each model's own tokens.")
    if len(beside) > 1:
        said.append(
            f"The intervals of the {len(beside)} differences hold together with {LEVEL:.0%} "
            f"(Bonferroni: {100 * level_of(len(models)):.1f}% each)."
        )
    return said
