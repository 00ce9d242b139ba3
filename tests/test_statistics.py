"""Intervals over prompts: literals by hand, naive computations, and coverage on simulated data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tether import statistics
from tether.statistics import (
    Estimate,
    bootstrap,
    bootstrap_mean,
    mean_interval,
    normal_cdf,
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


def test_the_normal_distribution():
    for x in (-3.0, -0.5, 0.0, 1.2):
        assert normal_quantile(normal_cdf(x)) == pytest.approx(x, abs=1e-6)


def test_the_bootstrap_of_four_prompts_by_all_of_its_256_draws():
    """With P = 4 the lower tail is Phi(-3.182446 sqrt(4 / 3)) = 0.00012 < 1 / 256: the ends are the extreme draws. At a
    level of 0.6 it is Phi(-0.978472 sqrt(4 / 3)) = 0.129."""
    values = [0.0, 1.0, 4.0, 11.0]
    means = sorted(sum(drawn) / 4 for drawn in itertools.product(values, repeat=4))
    found = bootstrap_mean(values, seed=0)
    assert (found.value, found.low, found.high) == (4.0, 0.0, 11.0)
    narrow = bootstrap_mean(values, seed=0, level=0.6)
    assert narrow.low == means[int(0.129 * 256)]
    assert narrow.high == means[256 - 1 - int(0.129 * 256)]
    assert bootstrap_mean([3.0], seed=0).low == -math.inf
    assert bootstrap_mean([3.0], seed=0).high == math.inf


def test_all_figures_of_a_prompt_are_drawn_together():
    """Paired: what two policies share cancels in each draw, and the total of a ratio is drawn with its count."""
    easy = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    gain = torch.arange(40, dtype=torch.float64)
    paired = bootstrap(lambda n: n @ (easy + gain) / 40 - n @ easy / 40, 40, seed=3)
    alone = bootstrap_mean(gain.tolist(), seed=3)
    assert (paired.low, paired.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    weight = torch.tensor([1.0, 3.0] * 20, dtype=torch.float64)
    ratio = bootstrap(lambda n: n @ (7.0 * weight) / (n @ weight), 40, seed=3)
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(7.0),) * 3


def test_a_bootstrap_is_the_same_when_it_is_repeated(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(1)).tolist()
    first = bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=6) != first
    monkeypatch.setattr(statistics, "AT_ONCE", 700)  # and in parts of another size
    again = bootstrap_mean(values, seed=5)
    assert (again.low, again.high) == (pytest.approx(first.low, abs=1e-12), pytest.approx(first.high, abs=1e-12))
    sizes = []
    statistics.bootstrap(lambda counts: sizes.append(len(counts)) or counts[:, 0], 50, seed=5, width=175)
    assert sizes == [1, *[4] * 1000]


def test_the_bootstrap_of_normal_figures_is_as_wide_as_students_interval():
    for prompts in (8, 30, 200):
        values = torch.tensor([normal_quantile((i + 0.5) / prompts) for i in range(prompts)]).tolist()
        found, exact = bootstrap_mean(values, seed=0), mean_interval(values)
        assert found.half_width == pytest.approx(exact.half_width, rel=0.06)
        assert found.std == pytest.approx(exact.std, rel=0.04)


@pytest.mark.parametrize("kind", SKEW)
@pytest.mark.parametrize(("prompts", "completions"), [(8, 4), (16, 1), (48, 2)])
def test_coverage_of_the_bootstrap(prompts, completions, kind, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    scores, _, true = simulated(prompts, completions, kind, seed=prompts)
    held = 0
    for seed, row in enumerate(scores.mean(2)[:1000].tolist()):
        found = bootstrap_mean(row, seed=seed)
        held += found.low <= true <= found.high
    assert 0.92 <= held / 1000 <= 0.97
