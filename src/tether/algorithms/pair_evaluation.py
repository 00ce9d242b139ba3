"""What the scores of a reward model on held-out pairs say: accuracy with its interval, calibration, and length.

With d = r_w - r_l of a pair, the model is right where d > 0, and half right where d = 0; its confidence in the side
that it prefers is sigmoid(|d|).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.statistics import LEVEL, normal_quantile, t_quantile
from tether.types import Metrics, PreferencePair

BINS = 10
"""Of confidence, from 0.5 to 1."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of a reward model on held-out pairs."""

    pairs: int
    prompts: int
    """Different prompts of the pairs; a pair without a prompt counts as one."""
    accuracy: float
    """Share of pairs whose chosen side scores higher; a tie counts half."""
    accuracy_low: float
    accuracy_high: float
    """The 95% interval of the accuracy (:func:`accuracy_interval`)."""
    log_loss: float
    """Mean of -log sigmoid(r_w - r_l), nats; random guessing has log 2 = 0.693."""
    calibration_error: float
    """Expected calibration error: mean over pairs of |accuracy - confidence| in ten bins of confidence."""
    bins: tuple[tuple[float, float, int], ...]
    """The bins that hold pairs: (mean confidence, accuracy, pairs)."""
    mean_margin: float
    """Mean of r_w - r_l."""
    longer_wins: float
    """Accuracy, on the same pairs, of the rule that the side with more tokens is preferred; a tie counts half."""
    prefers_longer: float
    """Share of the pairs of different length whose longer side scores higher, ties half; 0.5 without such pairs."""

    @property
    def uncertainty(self) -> float:
        """The distance from the accuracy to the farther end of its interval."""
        return max(self.accuracy - self.accuracy_low, self.accuracy_high - self.accuracy)

    def metrics(self) -> Metrics:
        return {
            "eval/accuracy": self.accuracy,
            "eval/loss": self.log_loss,
            "eval/calibration_error": self.calibration_error,
            "eval/margin": self.mean_margin,
        }


def assess(difference: Tensor, *, longer_by: Tensor, prompts: Sequence[Hashable]) -> Evaluation:
    """The evaluation of score differences r_w - r_l [N] of pairs of these ``prompts`` [N], whose chosen side has
    ``longer_by`` [N] tokens more than the rejected one."""
    d = difference.double()
    right, by_length = sign_share(d), sign_share(longer_by)
    bins = calibration(d)
    differ = longer_by != 0
    low, high = accuracy_interval(right.tolist(), prompts)
    return Evaluation(
        pairs=len(d),
        prompts=len(set(prompts)),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        log_loss=float(-torch.nn.functional.logsigmoid(d).mean()),
        calibration_error=sum(n * abs(a - c) for c, a, n in bins) / len(d),
        bins=bins,
        mean_margin=float(d.mean()),
        longer_wins=float(by_length.mean()),
        prefers_longer=float(sign_share(d * longer_by)[differ].mean()) if differ.any() else 0.5,
    )


def sign_share(values: Tensor) -> Tensor:
    """1 where a value is positive, 1/2 where it is 0, and 0 where it is negative."""
    return (values.sign().double() + 1) / 2


def calibration(difference: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Mean confidence, accuracy and pairs of each of :data:`BINS` equal bins of confidence that holds a pair."""
    right, confidence = sign_share(difference), difference.double().abs().sigmoid()
    edges = torch.linspace(0.5, 1.0, BINS + 1, dtype=torch.float64)
    which = torch.bucketize(confidence, edges[1:-1], right=True)
    return tuple(
        (float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for b in range(BINS)
        if (inside := which == b).any()
    )


def accuracy_interval(
    right: Sequence[float], prompts: Sequence[Hashable], *, level: float = LEVEL
) -> tuple[float, float]:
    """Wilson's interval of the mean p of ``right``, values in [0, 1], one per pair:

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Pairs of one of the ``prompts`` are alike, and count less than as many pairs of different ones. Where a prompt has
    several, n is the number of independent pairs that would have the variance seen between prompts,

        p (1 - p) / n = C / (C - 1) * sum over the C prompts of (sum over its pairs of (right - p))^2 / N^2

    and at most the number N of pairs (C where p is 0 or 1), and z is the quantile of Student's t with C - 1 degrees of
    freedom in place of the normal one. Several pairs of a single prompt say nothing about others: 0 to 1.

    Source: Wilson 1927; Korn and Graubard 1998 for clusters.
    """
    members: dict[Hashable, list[float]] = {}
    for value, prompt in zip(right, prompts, strict=True):
        members.setdefault(prompt, []).append(value)
    pairs, clusters = len(right), len(members)
    p = math.fsum(right) / pairs
    count, z = float(pairs), normal_quantile((1 + level) / 2)
    if clusters == 1 < pairs:
        return 0.0, 1.0
    if clusters < pairs:
        sums = (math.fsum(own) - len(own) * p for own in members.values())
        variance = clusters / (clusters - 1) * math.fsum(one**2 for one in sums) / pairs**2
        count = clusters if p in (0, 1) else min(pairs, p * (1 - p) / variance) if variance > 0 else pairs
        z = t_quantile((1 + level) / 2, clusters - 1)
    middle = p + z**2 / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def prompts_of(pairs: Sequence[PreferencePair]) -> list[Hashable]:
    """What tells the prompts of pairs apart; a pair whose sides have no more than a BOS in common is one by itself."""
    return [pair.prompt_ids if len(pair.prompt_ids) > 1 else i for i, pair in enumerate(pairs)]


def evaluation_of(pairs: Sequence[PreferencePair], scores: Tensor) -> Evaluation:
    """The evaluation of ``pairs`` from the scores [2, N] of their chosen and rejected sides."""
    longer_by = torch.tensor([len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs])
    return assess(scores[0] - scores[1], longer_by=longer_by, prompts=prompts_of(pairs))
