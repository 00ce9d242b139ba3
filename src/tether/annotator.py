"""A simulated annotator: it prefers one of two completions by a Bradley-Terry draw on scores that it alone sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tether.seeds import generator
from tether.types import ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Stands for the human: prefers the higher score, the more reliably the larger the difference."""

    sharpness: float
    """It prefers a to b with probability sigmoid(sharpness * (score_a - score_b))."""
    least_difference: float
    """Pairs whose scores differ by less are not shown to it."""
    seed: int

    def probability(self, difference: float) -> float:
        """P(the first of two is preferred) where its score is higher by ``difference``, Bradley-Terry."""
        return bradley_terry(self.sharpness * difference)

    def pairs(self, groups: Sequence[ScoredGroup]) -> Iterator[dict[str, Any]]:
        """Rows with ``prompt``, ``chosen``, ``rejected`` and ``clear``, the probability that the better one is chosen.

        The i-th best of a prompt's completions is shown with the i-th best of their worse half: clear cases teach more
        than near-ties. A completion without text or score is not shown.
        """
        for number, group in enumerate(groups):
            draws = torch.rand(len(group.scores), generator=generator(self.seed, "annotator", number)).tolist()
            rows = zip(group.rollouts.completions, (score.total for score in group.scores), strict=True)
            ranked = sorted(((c, total) for c, total in rows if total is not None), key=lambda row: -row[1])
            half = len(ranked) // 2
            for (a, score_a), (b, score_b), draw in zip(ranked[:half], ranked[-half:], draws, strict=False):
                difference = score_a - score_b
                if abs(difference) < self.least_difference or not (a.text.strip() and b.text.strip()):
                    continue
                probability = self.probability(difference)
                chosen, rejected = (a, b) if draw < probability else (b, a)
                yield {
                    "prompt": group.rollouts.prompt.text,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "clear": max(probability, 1 - probability),
                }


def bradley_terry(difference: float) -> float:
    """sigmoid(difference): how often the first of two is preferred whose strength is higher by that (Bradley and Terry
    1952)."""
    if difference >= 0:
        return 1.0 / (1.0 + math.exp(-difference))
    return 1.0 - bradley_terry(-difference)


def ceiling(pairs: Sequence[dict[str, Any]]) -> float:
    """The accuracy on an annotator's pairs of a judge that knows its scores: the mean of ``clear``."""
    clear: list[float] = [pair["clear"] for pair in pairs]
    return sum(clear) / len(clear)
