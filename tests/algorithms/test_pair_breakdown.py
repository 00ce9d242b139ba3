"""Where a reward model is right: bins, correlations and paired differences, by hand and by other formulas."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from tether.algorithms.pair_breakdown import (
    accuracy_difference,
    length_bins,
    length_correlation,
    length_correlation_in_pairs,
    length_sides,
    part,
    value_groups,
)
from tether.algorithms.pair_evaluation import accuracy_interval


def random_pairs(count, *, slope=0.0, level=0.0, seed=0):
    """Scores and lengths [2, N] that have ``slope`` score per token, and per prompt ``level`` for what both share."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, generator=generator)
    lengths = 40 + 10 * torch.randn(2, count, generator=generator) + 20 * shared
    return slope * lengths + level * shared + torch.randn(2, count, generator=generator), lengths.round()


def test_parts_by_hand():
    right, prompts = [1.0, 0.5, 0.0, 1.0], ["a", "a", "b", "c"]
    found = part("x", right, prompts, [0, 1, 3])
    assert (found.name, found.pairs, found.accuracy) == ("x", 3, pytest.approx(2.5 / 3))
    assert (found.low, found.high) == accuracy_interval([1.0, 0.5, 1.0], ["a", "a", "c"])


def test_bins_and_sides_of_length():
    longer_by = [-9, 4, 0, -1, 12, 2, -4, 0]
    assert length_bins(longer_by) == [
        ("shorter by 4 or more", [0, 6]),
        ("shorter by less than 4", [3]),
        ("as long", [2, 7]),
        ("longer by less than 4", [5]),
        ("longer by 4 or more", [1, 4]),
    ]
    assert length_sides(longer_by) == [("shorter", [0, 3, 6]), ("longer", [1, 4, 5])]
    assert length_bins([0, 0]) == [("as long", [0, 1])]
    assert length_sides([0, 3]) == [("longer", [1])]


def test_values_of_a_column_are_told_apart_by_their_text():
    assert value_groups(["b", 1, None, "b", "1"]) == [("b", [0, 3]), ("1", [1, 4]), ("None", [2])]


def test_the_correlation_is_pearsons_over_both_sides():
    scores, lengths = random_pairs(50, slope=0.05)
    found = length_correlation(scores, lengths, range(50), seed=0)
    expected = statistics.correlation(scores.flatten().tolist(), lengths.flatten().tolist())
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.low < found.value < found.high


def test_the_correlation_in_pairs_is_pearsons_of_what_the_pair_does_not_share():
    scores, lengths = random_pairs(50, slope=0.05, level=3.0)
    found = length_correlation_in_pairs(scores, lengths, range(50), seed=0)
    flat = [(one - one.mean(0)).flatten().tolist() for one in (scores.double(), lengths.double())]
    assert found.value == pytest.approx(statistics.correlation(*flat))
    swapped = length_correlation_in_pairs(scores.flip(0), lengths.flip(0), range(50), seed=0)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((found.value, found.low, found.high))


def test_prompts_with_long_answers_do_not_make_a_model_like_length():
    """Scores that follow the prompt alone correlate with length over all answers, and not within pairs."""
    scores, lengths = random_pairs(2000, level=3.0, seed=1)
    assert length_correlation(scores, lengths, range(2000), seed=0).value > 0.7
    assert abs(length_correlation_in_pairs(scores, lengths, range(2000), seed=0).value) < 0.06


def test_scores_that_are_the_length_correlate_wholly():
    _, lengths = random_pairs(20)
    for measure in (length_correlation, length_correlation_in_pairs):
        assert measure(2 * lengths - 5, lengths, range(20), seed=0).value == pytest.approx(1.0)
        assert measure(-lengths, lengths, range(20), seed=0).value == pytest.approx(-1.0)
        assert math.isnan(measure(lengths, torch.full_like(lengths, 7.0), range(20), seed=0).value)


def test_the_difference_of_accuracies_is_paired():
    """Right on 3 of 4 and on 1.5 of 4; and what both find hard cancels."""
    own, rival = torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([1.0, -2.0, -1.0, 0.0])
    found = accuracy_difference(own, rival, "abcd", seed=0)
    assert found.value == pytest.approx((3 - 1.5) / 4)
    hard = torch.randn(200, generator=torch.Generator().manual_seed(0))
    better = torch.where(torch.arange(200) % 10 == 0, 1.0, hard)
    paired = accuracy_difference(better, hard, range(200), seed=0)
    low, high = accuracy_interval((hard > 0).double().tolist(), range(200))
    assert paired.low > 0
    assert paired.value < (high - low) / 2  # which the two intervals alone would not tell


def test_pairs_of_one_prompt_are_drawn_together():
    """Each pair written ten times, as of its prompt, says no more; as of a prompt of its own, it would."""
    generator = torch.Generator().manual_seed(0)
    own, rival = torch.randn(2, 40, generator=generator)
    once = accuracy_difference(own, rival, range(40), seed=0)
    ten = own.repeat_interleave(10), rival.repeat_interleave(10)
    clustered = accuracy_difference(*ten, [i // 10 for i in range(400)], seed=0)
    assert (clustered.value, clustered.low, clustered.high) == pytest.approx((once.value, once.low, once.high))
    assert accuracy_difference(*ten, range(400), seed=0).half_width < 0.5 * once.half_width
