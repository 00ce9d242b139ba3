"""What scores on held-out pairs say: accuracy and its interval, calibration, and what length alone would say."""

from __future__ import annotations

import math

import pytest
import torch

from tether.algorithms.pair_evaluation import accuracy_interval, assess, evaluation_of, prompts_of, sign_share
from tether.statistics import t_quantile
from tether.types import PreferencePair


def judged(differences, **given):
    """The evaluation of these differences, of pairs of different prompts and equal sides."""
    d = torch.tensor(differences)
    return assess(d, **{"longer_by": torch.zeros(len(d)), "prompts": range(len(d)), **given})


def test_assessment_by_hand():
    """Differences log 3, -log 3 and 0: confidences 3/4, 3/4 and 1/2; right, wrong and a tie."""
    found = judged([math.log(3), -math.log(3), 0.0])
    assert found.accuracy == pytest.approx(0.5)
    assert found.log_loss == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3, rel=1e-5)
    assert [(round(c, 4), a, n) for c, a, n in found.bins] == [(0.5, 0.5, 1), (0.75, 0.5, 2)]
    assert found.calibration_error == pytest.approx(2 * 0.25 / 3)
    assert (found.pairs, found.prompts, found.mean_margin) == (3, 3, pytest.approx(0.0))


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    """Labels drawn with exactly the stated confidence, by counting: 4,000 pairs at each of four differences."""
    honest = []
    for difference in (0.3, 0.9, 1.6, 3.0):
        wins = round(4000 * torch.sigmoid(torch.tensor(difference)).item())
        honest += [difference] * wins + [-difference] * (4000 - wins)
    assert judged(honest).calibration_error < 1e-3
    assert judged([3 * d for d in honest]).calibration_error > 0.1


def test_what_length_alone_would_say():
    """Chosen longer in 3 of 4 pairs that differ, and one as long: the rule has (3 + 1/2) / 5. The model prefers the
    longer side in the first, the third and, by a tie, half of the fourth."""
    found = judged([1.0, -1.0, -2.0, 0.0, 5.0], longer_by=torch.tensor([4, 1, -3, 2, 0]))
    assert found.longer_wins == pytest.approx(3.5 / 5)
    assert found.prefers_longer == pytest.approx(2.5 / 4)
    assert judged([1.0, -1.0]).prefers_longer == 0.5


def test_a_length_detector_prefers_the_longer_side_always():
    longer_by = torch.tensor([5, -2, 9, -1])
    found = assess(longer_by * 0.1, longer_by=longer_by, prompts=range(4))
    assert (found.prefers_longer, found.accuracy, found.longer_wins) == (1.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I: method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),  # 1 / (1 + z^2 / n)
    ],
)
def test_wilsons_interval_against_published_figures(right, count, low, high):
    found = accuracy_interval([1.0] * right + [0.0] * (count - right), range(count))
    assert found == pytest.approx((low, high), abs=5e-5)


def test_the_interval_over_several_pairs_per_prompt_by_hand():
    """Prompts with 2, 2, 2 and 4 pairs, of which 2, 0, 1 and 3 are right: p = 0.6, residual sums 0.8, -1.2, -0.2, 0.6,
    variance 4/3 * 2.48 / 100, n = 0.24 / variance = 7.258, and t(3) instead of z."""
    right = [1, 1, 0, 0, 1, 0, 1, 1, 1, 0]
    prompts = [*"aabbcc", *"dddd"]
    n, t = 0.24 / (4 / 3 * 2.48 / 100), t_quantile(0.975, 3)
    half = t * math.sqrt(0.24 / n + t**2 / (4 * n**2)) / (1 + t**2 / n)
    middle = (0.6 + t**2 / (2 * n)) / (1 + t**2 / n)
    assert accuracy_interval(right, prompts) == pytest.approx((middle - half, middle + half))
    assert n == pytest.approx(7.258, abs=1e-3)


def test_pairs_of_one_prompt_that_repeat_each_other_count_as_one_each():
    """Ten copies of each of 40 pairs say little more than the 40: not what 400 would."""
    right = [float(i % 3 > 0) for i in range(40)]
    plain = accuracy_interval(right, range(40))
    copied = accuracy_interval(right * 10, list(range(40)) * 10)
    many = accuracy_interval(right * 10, range(400))
    assert copied[1] - copied[0] == pytest.approx(plain[1] - plain[0], rel=0.06)
    assert copied[1] - copied[0] > 2.8 * (many[1] - many[0])


def test_several_pairs_of_one_prompt_say_nothing_about_others():
    assert accuracy_interval([1, 1, 0], [0, 0, 0]) == (0.0, 1.0)
    assert accuracy_interval([1] * 6, [0, 0, 0, 1, 1, 1])[0] < 0.1


@pytest.mark.parametrize(
    ("prompts", "per_prompt", "p", "spread"), [(100, 1, 0.65, 0.0), (30, 1, 0.8, 0.0), (25, 12, 0.7, 0.25)]
)
def test_the_interval_covers_what_it_says(prompts, per_prompt, p, spread):
    """In 2,000 simulated sets the accuracy of a prompt's pairs is p plus or minus ``spread``, half of them each."""
    generator = torch.Generator().manual_seed(0)
    index = [i for i in range(prompts) for _ in range(per_prompt)]
    covered = naive = 0
    for _ in range(2000):
        own = p + spread * (2.0 * torch.randint(2, (prompts, 1), generator=generator) - 1)
        right = (torch.rand(prompts, per_prompt, generator=generator) < own).flatten().tolist()
        low, high = accuracy_interval(right, index)
        covered += low <= p <= high
        if spread:
            low, high = accuracy_interval(right, range(len(right)))
            naive += low <= p <= high
    assert 0.93 <= covered / 2000 <= 0.975
    assert naive / 2000 < 0.85  # what it would be if the pairs of a prompt were independent


def test_scores_and_lengths_reach_the_evaluation():
    pairs = [
        PreferencePair(prompt_ids=(0, 5), chosen_ids=(6, 7, 1), rejected_ids=(8, 1)),
        PreferencePair(prompt_ids=(0, 5), chosen_ids=(6, 1), rejected_ids=(9, 9, 1)),
        PreferencePair(prompt_ids=(0,), chosen_ids=(6, 1), rejected_ids=(9, 1)),
        PreferencePair(prompt_ids=(0,), chosen_ids=(7, 1), rejected_ids=(9, 1)),
    ]
    found = evaluation_of(pairs, torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 3.0, 1.0, 1.0]]))
    assert (found.pairs, found.prompts) == (4, 3)
    assert (found.accuracy, found.longer_wins, found.prefers_longer) == (0.75, 0.5, 1.0)
    assert found.uncertainty == max(found.accuracy - found.accuracy_low, found.accuracy_high - found.accuracy)
    assert len(set(prompts_of(pairs))) == 3


def test_signs():
    assert sign_share(torch.tensor([-2, 0, 7])).tolist() == [0.0, 0.5, 1.0]
