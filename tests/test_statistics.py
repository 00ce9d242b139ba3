"""Intervals over prompts: literals by hand, naive computations, and coverage on simulated data."""

from __future__ import annotations

import math

import pytest
import torch

from tether.statistics import (
    Estimate,
    mean_interval,
    normal_quantile,
    prompts_needed,
    share_interval,
    simultaneous,
    t_cdf,
    t_quantile,
    win_share,
)

DATASETS = 2000


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (30, 2.0423), (120, 1.9799)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(df, expected):
    assert t_quantile(0.975, df) == pytest.approx(expected, abs=5e-5)
    assert t_quantile(0.025, df) == pytest.approx(-expected, abs=5e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 63])
def test_the_distribution_of_students_t_is_the_integral_of_its_density(df):
    t = torch.linspace(0, 1.7, 20001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + t.square() / df) ** (-(df + 1) / 2)
    assert t_cdf(1.7, df) == pytest.approx(0.5 + float(torch.trapezoid(density, t)), abs=1e-8)
    assert t_cdf(1.7, df) + t_cdf(-1.7, df) == pytest.approx(1.0)


def test_quantiles_of_the_normal_distribution():
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)
    assert normal_quantile(0.8) == pytest.approx(0.841621, abs=1e-6)
    assert t_quantile(0.975, 100_000) == pytest.approx(normal_quantile(0.975), abs=1e-4)


def test_the_interval_of_a_mean_by_hand():
    """1, 2, 3, 4: mean 2.5, std sqrt(5 / 3), and t = 3.1824 with 3 degrees of freedom."""
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.prompts) == (2.5, 4)
    assert found.std == pytest.approx(1.290994)
    assert found.half_width == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)
    assert found.excludes(0.4)
    assert not found.excludes(0.5)


def test_one_prompt_has_no_interval():
    assert mean_interval([2.0]) == Estimate(value=2.0, low=-math.inf, high=math.inf, prompts=1, std=0.0)
    assert share_interval([1.0]) == Estimate(value=1.0, low=0.0, high=1.0, prompts=1, std=0.0)
    assert prompts_needed(mean_interval([2.0])) is None
    with pytest.raises(ValueError, match="no prompt"):
        mean_interval([])


def test_the_interval_of_a_share_by_hand():
    """Three wins of four: p (1 - p) / (std^2 / 4) = 3 comparisons, and t^2 = 10.128."""
    found = share_interval([1.0, 1.0, 1.0, 0.0])
    assert found.value == 0.75
    assert (found.low, found.high) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.9835, abs=1e-4))


def test_a_share_of_all_is_not_certain():
    """Ten prompts of ten: the lower end of Wilson's interval is n / (n + t^2)."""
    found = share_interval([1.0] * 10)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(10 / (10 + 2.262157**2))
    tied = share_interval([0.5] * 10)
    assert tied.low == pytest.approx(1 - tied.high)
    assert 0.1 < tied.low < 0.5


@pytest.mark.parametrize(
    ("own", "rival", "same_seeds", "expected"),
    [
        ((1.0, 0.0), (0.0, 1.0), True, 0.5),
        ((1.0, 0.0), (0.0, 0.0), True, 0.75),  # a tie is a half
        ((1.0, 0.0), (0.0, 0.5), True, 0.5),
        ((1.0, 0.0), (0.0, 0.5), False, (1 + 1 + 0.5 + 0) / 4),  # each with each
        ((1.0,), (0.0, 2.0, 1.0), False, (1 + 0 + 0.5) / 3),
        ((1.0, None), (0.0, 5.0), True, 1.0),
        ((None,), (0.0,), True, None),
    ],
)
def test_the_share_of_comparisons_won(own, rival, same_seeds, expected):
    assert win_share(own, rival, same_seeds=same_seeds) == expected


def test_simultaneous_intervals_share_the_level():
    assert simultaneous(0.95, 1) == pytest.approx(0.95)
    assert simultaneous(0.95, 5) == pytest.approx(0.99)
    assert simultaneous(0.95, 0) == pytest.approx(0.95)


@pytest.mark.parametrize(("value", "std"), [(0.5, 1.0), (0.1, 1.0), (-0.02, 0.3), (3.0, 0.1)])
def test_the_prompts_needed_are_the_fewest_that_do(value, std):
    def does(count: int) -> bool:
        return (t_quantile(0.975, count - 1) + 0.841621) * std / math.sqrt(count) <= abs(value)

    given = Estimate(value=value, low=value - 1, high=value + 1, prompts=8, std=std)
    naive = next(count for count in range(2, 5000) if does(count))
    assert prompts_needed(given) == pytest.approx(naive, rel=2e-3)


def test_no_number_of_prompts_tells_what_is_equal():
    assert prompts_needed(Estimate(value=0.0, low=-1, high=1, prompts=8, std=1.0)) is None
    assert prompts_needed(Estimate(value=1e-6, low=-1, high=1, prompts=8, std=1.0)) is None


def share_told(true: float, *, prompts: int, std: float, seed: int) -> float:
    """How often the interval of a normal difference leaves 0 out."""
    generator = torch.Generator().manual_seed(seed)
    data = true + std * torch.randn(DATASETS, prompts, generator=generator, dtype=torch.float64)
    return sum(mean_interval(row).excludes(0.0) for row in data.tolist()) / DATASETS


def test_as_many_prompts_tell_a_difference_in_four_cases_of_five():
    given = Estimate(value=0.3, low=-1, high=1, prompts=8, std=1.0)
    needed = prompts_needed(given)
    assert needed is not None
    assert share_told(0.3, prompts=needed, std=1.0, seed=0) == pytest.approx(0.8, abs=0.03)


SKEW = {"normal": 0.0, "skewed": 1.5}
"""Scale of an exponential part of the scores: with it, a completion's score has a skewness of 1.3."""


def simulated(prompts: int, completions: int, kind: str, *, seed: int, shift: float = 0.0):
    """Scores [DATASETS, prompts, completions] of a policy, its prompts' own levels, and the mean that is true."""
    generator = torch.Generator().manual_seed(seed)
    size = (DATASETS, prompts, completions)
    levels = torch.randn(DATASETS, prompts, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    tail = SKEW[kind] * torch.empty(size, dtype=torch.float64).exponential_(generator=generator)
    return levels + noise + tail + shift, levels, SKEW[kind] + shift


def coverage(rows: torch.Tensor, true: float, interval) -> float:
    """The share of data sets, each a row of figures per prompt, whose interval holds the true value."""
    return sum(not interval(row).excludes(true) for row in rows.tolist()) / len(rows)


@pytest.mark.parametrize("kind", SKEW)
@pytest.mark.parametrize(("prompts", "completions"), [(8, 4), (16, 1), (48, 2)])
def test_coverage_of_the_mean(prompts, completions, kind):
    scores, _, true = simulated(prompts, completions, kind, seed=prompts)
    assert 0.93 <= coverage(scores.mean(2), true, mean_interval) <= 0.97


@pytest.mark.parametrize("kind", SKEW)
@pytest.mark.parametrize(("prompts", "completions"), [(8, 4), (16, 1), (48, 2)])
def test_coverage_of_a_paired_difference(prompts, completions, kind):
    """Both policies find some prompts easy; the change differs by prompt too."""
    own, levels, _ = simulated(prompts, completions, kind, seed=prompts + 1, shift=0.2)
    rival, *_ = simulated(prompts, completions, kind, seed=prompts + 2)
    changed = own + 0.5 * levels  # the levels have mean 0
    other = rival + 2 * levels
    assert 0.93 <= coverage((changed - other).mean(2), 0.2, mean_interval) <= 0.97


def pairwise(own: torch.Tensor, rival: torch.Tensor) -> torch.Tensor:
    """Shares won, each completion of a prompt with each, ties half."""
    a, b = own.unsqueeze(-1), rival.unsqueeze(-2)
    return ((a > b).double() + 0.5 * (a == b).double()).mean((-2, -1))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", SKEW)
@pytest.mark.parametrize(("prompts", "completions"), [(8, 4), (48, 2), (64, 1)])
def test_coverage_of_a_win_rate(prompts, completions, kind, ties):
    def drawn(width: int, count: int, seed: int) -> torch.Tensor:
        own, levels, _ = simulated(width, count, kind, seed=seed, shift=0.7)
        rival = simulated(width, count, kind, seed=seed + 1)[0] - 0.5 * levels
        return pairwise(*((scores / 2).round() if ties else scores for scores in (own, rival)))

    true = float(drawn(200, 3, 1000).mean())
    assert 0.93 <= coverage(drawn(prompts, completions, prompts), true, share_interval) <= 0.97
