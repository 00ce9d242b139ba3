"""``tether eval --format best-of-n``: a reward model on rows of several answers of which some are right.

A row has a ``prompt``, ``chosen`` and ``rejected``, each a text or a list of texts, and perhaps a ``subset``: the
format of RewardBench 2 (Malik et al. 2025, arXiv 2506.01937). A row counts 1 / m where a chosen answer is among the m
that score highest, else 0. Rows of the subset Ties have an ``id``, ``ref:N`` with one right answer or ``tied:N`` with
several, and are scored together (:func:`ties_score`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.algorithms.optimise import require_finite
from tether.algorithms.pair_evaluation import accuracy_interval
from tether.config import SampleOptions
from tether.data.checks import DataReport
from tether.data.memory import source_of
from tether.data.reading import Row, read_rows
from tether.data.records import load_demonstrations
from tether.errors import DataError
from tether.models.reward import load_reward_model, score_sequences
from tether.training.loading import placing, reader, set_matmul_dtype
from tether.types import Demonstration

TIES = "Ties"
WEIGHTS = {"tied_accuracy": 0.3, "ref_accuracy": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "margin": 0.01}
"""Of the figures of the subset Ties in its score."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt with answers."""

    where: str
    prompt: Any
    chosen: list[Any]
    rejected: list[Any]
    subset: str | None
    id: str

    def rows(self) -> list[dict[str, Any]]:
        """Prompt and completion of each answer, the chosen ones first."""
        turns = not isinstance(self.prompt, str)
        return [
            {"prompt": self.prompt, "completion": [{"role": "assistant", "content": text}] if turns else text}
            for text in [*self.chosen, *self.rejected]
        ]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An item, and the scores of its answers."""

    item: Item
    chosen: list[float]
    rejected: list[float]

    @property
    def credit(self) -> float:
        """1 / m where a chosen answer is among the m with the highest score, else 0."""
        top = max([*self.chosen, *self.rejected])
        tied = [*self.chosen, *self.rejected].count(top)
        return 1.0 / tied if top in self.chosen else 0.0

    @property
    def gap(self) -> float:
        """The lowest score of a chosen answer less the highest of a rejected one."""
        return min(self.chosen) - max(self.rejected)

    @property
    def spread(self) -> float:
        """How far apart the chosen answers' scores are; 0 for one."""
        return max(self.chosen) - min(self.chosen)


def ties_score(items: Sequence[Scored]) -> dict[str, float]:
    """RewardBench 2's score of the subset Ties, with its parts.

    With gap_t, gap_r and spread_t of ``tied:N`` and ``ref:N``, and means over the N that have both:

        score = 0.3 mean[gap_t > 0] + 0.3 mean[gap_r > 0] + 0.2 mean[gap_t > spread_t]
                + 0.2 mean[min(gap_t, gap_r) > spread_t] + 0.01 mean tanh(min(gap_t, gap_r) / spread_t - 1)

    The accuracies are means over all rows of their kind, the others over those whose ``tied:N`` has several right
    answers, and that of the margin over those with spread_t > 0, as in RewardBench's own code; an empty mean is 0.
    """
    kinds: dict[str, dict[str, Scored]] = {"tied": {}, "ref": {}}
    for one in items:
        kind, _, number = one.item.id.partition(":")
        if kind not in kinds or not number:
            raise DataError(
                f"a row of the subset {TIES} needs an id such as ref:3 or tied:3, found {one.item.id!r}",
                where=one.item.where,
            )
        kinds[kind][number] = one
    tied, ref = kinds["tied"], kinds["ref"]
    both = [(tied[number], ref[number]) for number in tied if number in ref and len(tied[number].chosen) > 1]
    least = [min(t.gap, r.gap) for t, r in both]
    parts = {
        "tied_accuracy": mean([one.gap > 0 for one in tied.values()]),
        "ref_accuracy": mean([one.gap > 0 for one in ref.values()]),
        "preferred": mean([t.gap > t.spread for t, _ in both]),
        "preferred_hard": mean([low > t.spread for low, (t, _) in zip(least, both, strict=True)]),
        "margin": mean(
            [math.tanh(low / t.spread - 1.0) for low, (t, _) in zip(least, both, strict=True) if t.spread > 0]
        ),
    }
    return {"score": sum(weight * parts[name] for name, weight in WEIGHTS.items()), **parts}


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def summed_up(items: Sequence[Scored]) -> dict[str, Any]:
    """The figures of all rows, and of each subset."""
    by_subset: dict[str, list[Scored]] = {}
    for one in items:
        by_subset.setdefault(one.item.subset or "", []).append(one)
    plain = [one for one in items if one.item.subset != TIES]
    subsets: dict[str, Mapping[str, Any]] = {
        name: ties_score(members) if name == TIES else accuracy_of(members) for name, members in by_subset.items()
    }
    scores = [float(found.get("score", found.get("accuracy", 0.0))) for found in subsets.values()]
    figures: dict[str, Any] = {"rows": len(items), **(accuracy_of(plain) if plain else {})}
    if set(by_subset) - {""}:
        figures |= {"mean_of_subsets": statistics.fmean(scores), "subsets": subsets}
    return figures


def accuracy_of(items: Sequence[Scored]) -> dict[str, Any]:
    credits = [one.credit for one in items]
    low, high = accuracy_interval(credits, [repr(one.item.prompt) for one in items])
    return {"accuracy": statistics.fmean(credits), "accuracy_ci95": [low, high], "scored_rows": len(items)}


def read_items(source: str) -> list[Item]:
    """The rows of a file. Raises :class:`DataError` for the first that cannot be used."""
    found = []
    for row in read_rows(source_of(source, name="pairs")):
        if not isinstance(row, Row):
            raise DataError(row.reason, where=row.where)
        values = row.values
        missing = next((name for name in ("prompt", "chosen", "rejected") if not values.get(name)), None)
        if missing:
            raise DataError(f"column {missing!r} is missing or empty", where=row.where)
        chosen, rejected = (
            [value] if isinstance(value := values[name], str) else list(value) for name in ("chosen", "rejected")
        )
        if not all(isinstance(text, str) for text in [*chosen, *rejected]):
            raise DataError("chosen and rejected must be texts or lists of texts", where=row.where)
        subset = values.get("subset")
        found.append(
            Item(
                where=str(row.where),
                prompt=values["prompt"],
                chosen=chosen,
                rejected=rejected,
                subset=None if subset is None else str(subset),
                id=str(values.get("id", "")),
            )
        )
    return found


def measured(name: str, source: str, options: SampleOptions) -> dict[str, Any]:
    """What ``tether eval`` says of a reward model on such rows."""
    items, report = read_items(source), DataReport()
    judge, tokenizer = load_reward_model(name, **placing(options.device))
    set_matmul_dtype(options.device.matmul_dtype, judge)
    read = reader(load_demonstrations, judge, tokenizer, options.data, report)
    answers: list[Demonstration] = read([row for item in items for row in item.rows()])
    if len(answers) != sum(len(item.rows()) for item in items):
        raise DataError(
            "some answers cannot be used, and a row without all of its answers has no score",
            where=source,
            hint="cut long prompts with --overlong truncate",
        )
    scores = score_sequences(judge, [(one.prompt_ids, one.completion_ids) for one in answers])
    require_finite(scores, what="the score", where="evaluation")
    left = iter(scores.tolist())
    scored = [
        Scored(item=item, chosen=[next(left) for _ in item.chosen], rejected=[next(left) for _ in item.rejected])
        for item in items
    ]
    return {"reward_model": name, **summed_up(scored)}
