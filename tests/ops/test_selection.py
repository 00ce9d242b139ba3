"""k of n samples: values by hand, the mean over all subsets one by one, and identities."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from tether.ops.selection import majority_at_k, pass_at_k, selection_weights, subsets_within

SCORES = [0.3, -1.2, 0.3, 2.0, 0.7, -1.2, 0.3]


def test_literals():
    assert subsets_within(4, 2).tolist() == pytest.approx([0, 0, 1 / 6, 3 / 6, 1])
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)  # of the six pairs, three hold the one that passes
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert selection_weights(torch.tensor([5.0, 1.0, 3.0]), 2).tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert selection_weights(torch.tensor([1.0, 1.0, 0.0]), 2).tolist() == pytest.approx([0.5, 0.5, 0])
    # a twice and b once: one of three pairs is aa, and in two of them a and b share the vote
    assert majority_at_k(["a", "a", "b"], [True, True, False], [1, 2, 3]) == pytest.approx([2 / 3, 2 / 3, 1])
    assert majority_at_k(["a", "a", "b"], [False, False, True], [1, 2, 3]) == pytest.approx([1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("passed", [0, 1, 3, 7])
def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes(k, passed):
    n = 7
    holds = [any(i < passed for i in subset) for subset in itertools.combinations(range(n), k)]
    assert pass_at_k(n, passed, k) == pytest.approx(sum(holds) / len(holds))


@pytest.mark.parametrize("k", range(1, 8))
def test_the_weights_are_how_often_each_is_the_best_of_a_subset(k):
    expected = [0.0] * len(SCORES)
    subsets = list(itertools.combinations(range(len(SCORES)), k))
    for subset in subsets:
        top = max(SCORES[i] for i in subset)
        best = [i for i in subset if SCORES[i] == top]
        for i in best:
            expected[i] += 1 / len(best) / len(subsets)
    assert selection_weights(torch.tensor(SCORES), k).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "answers", ["aabbbcd", "abcdefg", "aaaaaaa", "aabbccd", "abababa"], ids=lambda answers: f"answers {answers}"
)
def test_majority_is_the_mean_over_all_subsets(answers):
    right = [answer in "ad" for answer in answers]
    right[-1] = not right[-1]  # one sample is not judged as the others of its answer
    share = {
        one: sum(r for a, r in zip(answers, right, strict=True) if a == one) / answers.count(one) for one in answers
    }
    ks = range(1, len(answers) + 1)
    expected = []
    for k in ks:
        credits = []
        for subset in itertools.combinations(answers, k):
            votes = Counter(subset)
            tied = [one for one, count in votes.items() if count == max(votes.values())]
            credits.append(sum(share[one] for one in tied) / len(tied))
        expected.append(sum(credits) / len(credits))
    assert majority_at_k(answers, right, ks) == pytest.approx(expected)


def test_one_sample_is_the_mean_and_all_samples_are_the_maximum():
    scores = torch.tensor(SCORES, dtype=torch.float64)
    assert float(selection_weights(scores, 1) @ scores) == pytest.approx(float(scores.mean()))
    assert float(selection_weights(scores, 7) @ scores) == float(scores.max())
    assert pass_at_k(9, 4, 1) == pytest.approx(4 / 9)
    assert majority_at_k("aab", [True, True, False], [1]) == pytest.approx([2 / 3])


def test_the_best_of_right_and_wrong_is_pass_at_k():
    verdicts = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    for k in range(1, 7):
        best = float(selection_weights(verdicts, k) @ verdicts.double())
        assert best == pytest.approx(pass_at_k(6, 2, k))


def test_two_answers_vote_as_a_hypergeometric_distribution():
    """40 of 100 right: more than half of 31 samples without replacement, from the distribution's own formula."""
    n, right, k = 100, 40, 31
    chance = sum(math.comb(right, i) * math.comb(n - right, k - i) for i in range(16, k + 1)) / math.comb(n, k)
    answers = ["right"] * right + ["wrong"] * (n - right)
    assert majority_at_k(answers, [one == "right" for one in answers], [k]) == pytest.approx([chance])


def test_samples_of_any_number_do_not_overflow():
    assert pass_at_k(100_000, 10, 50_000) == pytest.approx(1 - 0.5**10, rel=1e-3)
    assert subsets_within(5000, 2500)[4990] == pytest.approx(0.5**10, rel=1e-2)
    assert majority_at_k([0, 1] * 600, [True, False] * 600, [31]) == pytest.approx([0.5])


def test_the_estimates_have_no_bias():
    """The mean over all that 4 independent samples of a known distribution can be is what 2 fresh ones give."""
    values = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    fresh = torch.cartesian_prod(values, values).amax(1).mean()
    found = [float(selection_weights(four, 2) @ four) for four in torch.cartesian_prod(*[values] * 4)]
    assert sum(found) / len(found) == pytest.approx(float(fresh))
    pairs = [majority_at_k(four, [one == 0 for one in four], [2])[0] for four in itertools.product(range(3), repeat=4)]
    assert sum(pairs) / len(pairs) == pytest.approx(1 / 3)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_an_error(k):
    for call in (
        lambda: pass_at_k(4, 2, k),
        lambda: selection_weights(torch.zeros(4), k),
        lambda: majority_at_k("abcd", [True] * 4, [1, k]),
    ):
        with pytest.raises(ValueError, match=rf"k is {k} and n is 4"):
            call()
    with pytest.raises(ValueError, match="passed is 5 and n is 4"):
        pass_at_k(4, 5, 2)
