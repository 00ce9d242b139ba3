"""The curves of over-optimisation: by hand, by a loop, and from points whose parameters are known."""

from __future__ import annotations

import math

import pytest
import torch

from tether.ops.divergence import best_of_n_kl
from tether.ops.frontier import Fit, best_of_n_kl_of, design, fit_curve, peak_interval, peak_of


def fit(curve, c, a, b):
    return Fit(curve=curve, c=c, a=a, b=b, covariance=torch.zeros(3, 3, dtype=torch.float64), points=9)


def test_the_curves_by_hand():
    assert fit("best-of-n", 0.5, 1.0, 0.25).at(2.0) == pytest.approx(0.5 + 2 * (1 - 0.25 * 2))
    assert fit("rl", 0.5, 1.0, 0.25).at(2.0) == pytest.approx(0.5 + 2 * (1 - 0.25 * math.log(2)))
    assert fit("rl", 0.5, 1.0, 0.25).at(0.0) == 0.5
    assert design("rl", torch.tensor([0.0, 1.0, math.e])).tolist() == [
        [1.0, 0.0, 0.0],
        [1.0, 1.0, 0.0],
        pytest.approx([1.0, math.e, -math.e], rel=1e-6),
    ]


@pytest.mark.parametrize(("curve", "a", "b"), [("best-of-n", 1.0, 0.2), ("rl", 1.0, 0.6), ("rl", -0.2, 0.5)])
def test_the_peak_is_the_highest_point_of_the_curve(curve, a, b):
    peak, one = peak_of(curve, a, b), fit(curve, 0.3, a, b)
    assert peak is not None
    grid = [peak * 2 * i / 20000 for i in range(20001)]
    assert max(grid, key=one.at) == pytest.approx(peak, abs=3e-4 * max(1.0, peak))


@pytest.mark.parametrize(("curve", "a", "b"), [("rl", 1.0, 0.0), ("rl", 1.0, -1.0), ("best-of-n", -1.0, 1.0)])
def test_a_curve_without_a_peak(curve, a, b):
    assert peak_of(curve, a, b) is None


@pytest.mark.parametrize("curve", ["best-of-n", "rl"])
def test_points_on_a_curve_give_its_parameters(curve):
    d = torch.linspace(0, 4, 9, dtype=torch.float64)
    reward = torch.tensor([fit(curve, 0.5, 1.2, 0.4).at(float(x)) for x in d], dtype=torch.float64)
    found = fit_curve(curve, d, reward, torch.full((9,), 0.01))
    assert (found.c, found.a, found.b) == pytest.approx((0.5, 1.2, 0.4), abs=1e-9)


def test_the_solution_and_its_covariance_are_those_of_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    d = torch.rand(12, dtype=torch.float64, generator=generator) * 3
    reward, variance = (
        torch.randn(12, dtype=torch.float64, generator=generator),
        torch.rand(12, generator=generator) + 0.1,
    )
    found = fit_curve("rl", d, reward, variance)
    x, w = design("rl", d), torch.diag(1 / variance.double())
    normal = x.T @ w @ x
    solution = torch.linalg.solve(normal, x.T @ w @ reward)
    assert torch.allclose(torch.tensor([found.c, found.a, found.b], dtype=torch.float64), solution)
    residual = reward - x @ solution
    scatter = float(residual @ w @ residual) / 9
    assert torch.allclose(found.covariance, torch.linalg.inv(normal) * max(1.0, scatter))
    row = x[3]
    assert found.standard_error(float(d[3])) == pytest.approx(math.sqrt(float(row @ found.covariance @ row)))


def test_intervals_hold_the_truth_as_often_as_they_say():
    true, d = fit("rl", 0.1, 1.0, 0.6), torch.linspace(0.2, 4, 20, dtype=torch.float64)
    exact = torch.tensor([true.at(float(x)) for x in d], dtype=torch.float64)
    generator, held, peaks = torch.Generator().manual_seed(1), 0, 0
    for _ in range(100):
        found = fit_curve(
            "rl", d, exact + 0.05 * torch.randn(20, dtype=torch.float64, generator=generator), torch.full((20,), 0.0025)
        )
        held += abs(found.b - 0.6) <= 2.1 * math.sqrt(float(found.covariance[2, 2]))
        interval = peak_interval(found, draws=400)
        peaks += interval is not None and interval[0] <= true.peak <= interval[1]
    assert 88 <= held <= 100
    assert 88 <= peaks <= 100


def test_too_few_points():
    four = torch.arange(4.0)
    with pytest.raises(ValueError, match="5 points"):
        fit_curve("rl", four, four, torch.ones(4))
    with pytest.raises(ValueError, match="3 distances"):
        fit_curve("rl", torch.tensor([0.0, 1.0] * 3), torch.arange(6.0), torch.ones(6))


def test_the_peak_of_a_rising_curve_has_no_interval():
    d = torch.linspace(0, 4, 12, dtype=torch.float64)
    assert peak_interval(fit_curve("best-of-n", d, d + 0.1 * d * d, torch.full((12,), 1e-4))) is None


def test_the_kl_of_the_best_by_hand():
    two = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert best_of_n_kl_of(torch.tensor([0.0, 1.0] * 8), 2) == pytest.approx(two)
    assert best_of_n_kl_of(torch.ones(9), 5) == pytest.approx(0.0)
    assert best_of_n_kl_of(torch.tensor([0.0, 0.0, 1.0, 2.0]), 1) == pytest.approx(0.0)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_without_ties_it_is_the_closed_form(n):
    scores = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert best_of_n_kl_of(scores, n) == pytest.approx(best_of_n_kl(n))


@pytest.mark.parametrize("n", [2, 3, 8, 200])
def test_a_stretch_is_the_integral_and_ties_make_it_smaller(n):
    """One value that ties among others: a sum over a fine grid of the density of the rank."""
    scores = torch.tensor([0.0, 1.0, 2.0, 2.0, 2.0, 3.0])
    grid = (torch.arange(600_000, dtype=torch.float64) + 0.5) / 600_000
    density = n * grid ** (n - 1)
    inside = (grid > 2 / 6) & (grid < 5 / 6)
    apart = torch.xlogy(density, density)[~inside].sum() / len(grid)
    share = float(density[inside].mean() * 0.5)
    assert best_of_n_kl_of(scores, n) == pytest.approx(float(apart) + share * math.log(share / 0.5), abs=1e-4)
    assert 0 <= best_of_n_kl_of(scores, n) < best_of_n_kl(n)
