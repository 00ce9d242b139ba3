"""The win rate at equal length: a closed form, another optimiser, identities, and data with a known answer."""

from __future__ import annotations

import math

import pytest
import torch

from tether.ops.win_rates import PRIOR, length_controlled_win_rate


def once(wins, longer_by, **options):
    """With every comparison counted once."""
    y, d = torch.tensor(wins, dtype=torch.float64), torch.tensor(longer_by, dtype=torch.float64)
    return float(length_controlled_win_rate(y, d, torch.ones(1, len(y)), **options)[0])


def test_two_lengths_have_a_closed_form():
    """Three of four won where it is longer by 10, one of four where it is shorter: without a prior, theta is the mean
    of the two logits, log 3 and -log 3. With five of six and one of two it is log(5) / 2."""
    assert once([1, 1, 1, 0, 1, 0, 0, 0], [10] * 4 + [-10] * 4, prior=1e6) == pytest.approx(0.5)
    theta = (math.log(5) + math.log(1)) / 2
    found = once([1, 1, 1, 1, 1, 0, 1, 0], [10] * 6 + [-10] * 2, prior=1e6)
    assert found == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-6)


def sample(n, *, theta, phi, seed):
    generator = torch.Generator().manual_seed(seed)
    longer_by = torch.randn(n, generator=generator, dtype=torch.float64) * 20 + 15
    chance = (theta + phi * (longer_by / longer_by.std()).tanh()).sigmoid()
    return torch.bernoulli(chance, generator=generator), longer_by


def test_it_is_the_minimum_that_plain_gradient_descent_finds():
    wins, longer_by = sample(60, theta=0.3, phi=1.5, seed=0)
    wins[:7] = 0.5
    weights = [1.0 + i % 3 for i in range(60)]
    lengths = longer_by.tolist()
    middle = sum(lengths) / 60
    std = math.sqrt(sum((d - middle) ** 2 for d in lengths) / 59)
    theta = phi = 0.0
    for _ in range(20000):
        slope_theta, slope_phi = 0.0, phi / PRIOR**2
        for y, d, w in zip(wins.tolist(), lengths, weights, strict=True):
            error = w * (1 / (1 + math.exp(-theta - phi * math.tanh(d / std))) - y)
            slope_theta += error
            slope_phi += error * math.tanh(d / std)
        if abs(slope_theta) + abs(slope_phi) < 1e-9:
            break
        theta, phi = theta - 0.02 * slope_theta, phi - 0.02 * slope_phi
    found = length_controlled_win_rate(wins, longer_by, torch.tensor([weights]))
    assert float(found) == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-8)


def test_the_answer_that_the_data_were_made_with():
    """A model that wins by its length alone wins half of the comparisons at equal length; a better one more."""
    for theta, raw in ((0.0, 0.65), (0.8, 0.78)):
        wins, longer_by = sample(20000, theta=theta, phi=1.5, seed=1)
        assert float(wins.mean()) == pytest.approx(raw, abs=0.02)
        weights = torch.ones(1, len(wins))
        found = float(length_controlled_win_rate(wins, longer_by, weights))
        assert found == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.015)


def test_changing_sides_gives_one_minus_it():
    wins, longer_by = sample(40, theta=0.5, phi=-1.0, seed=2)
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    there = length_controlled_win_rate(wins, longer_by, weights)
    back = length_controlled_win_rate(1 - wins, -longer_by, weights)
    assert torch.allclose(there + back, torch.ones(5, dtype=torch.float64), atol=1e-9)
    assert once([0.5] * 6, [3, -1, 4, 0, 0, 7]) == pytest.approx(0.5)  # a model beside itself


@pytest.mark.parametrize("longer_by", [[0, 0, 0, 0, 0], [8, 8, 8, 8, 8]])
def test_without_differences_between_lengths_it_is_the_win_rate(longer_by):
    assert once([1, 0, 1, 0.5, 1], longer_by) == pytest.approx(0.7)


def test_ends():
    assert once([1, 1, 1], [5, -3, 9]) == 1
    assert once([0, 0], [5, -3]) == 0
    assert once([1.0], [5]) == 1
    assert once([0.5], [5]) == 0.5


def test_separated_by_length_it_stays_finite():
    """The longer text wins always, so that without the prior phi would be infinite; it is longer in three of four."""
    found = once([1] * 30 + [0] * 10, [5] * 30 + [-5] * 10)
    assert 0.5 < found < 0.7
    assert 0.5 < once([1] * 30 + [0] * 10, [5] * 30 + [-5] * 10, prior=25.0) < found


def test_a_weight_of_two_is_the_comparison_twice():
    wins, longer_by = sample(30, theta=0.2, phi=1.0, seed=3)
    wins[4], wins[9], longer_by[9] = 1.0, 0.0, longer_by[4]
    counts = torch.ones(2, 30)
    counts[1, 4], counts[1, 9] = 2, 0
    once_each, weighted = length_controlled_win_rate(wins, longer_by, counts).tolist()
    wins[9] = 1.0
    assert weighted == pytest.approx(float(length_controlled_win_rate(wins, longer_by, counts[:1])), abs=1e-9)
    assert weighted != pytest.approx(once_each, abs=1e-3)
