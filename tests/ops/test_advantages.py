"""Group-relative advantages."""

import itertools
import math

import pytest
import torch

from tether.ops.advantages import (
    batch_centred,
    centred,
    leave_one_out,
    max_of_k,
    relative,
    reward_spread,
    standardised,
    zero_variance,
)


def group_standardised(rewards):
    return standardised(rewards, scale="group")[0]


def batch_standardised(rewards):
    return standardised(rewards, scale="batch")[0]


REWARDS = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])


def test_literals():
    assert centred(REWARDS).tolist() == [[-1, 0, 1], [0, 0, 0]]
    assert leave_one_out(REWARDS).tolist() == [[-1.5, 0, 1.5], [0, 0, 0]]
    # Bessel std of 1, 2, 3 is 1
    assert group_standardised(REWARDS)[0].tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])
    assert group_standardised(REWARDS)[1].tolist() == [0, 0, 0]
    # Bessel std of -1, 0, 1, 0, 0, 0 is sqrt(2/5)
    assert batch_standardised(REWARDS)[0, 2].item() == pytest.approx(1 / (0.4**0.5 + 1e-4))


def test_leave_one_out_by_a_loop():
    rewards = torch.randn(4, 5)
    found = leave_one_out(rewards)
    for p in range(4):
        for i in range(5):
            others = [rewards[p, j].item() for j in range(5) if j != i]
            assert found[p, i].item() == pytest.approx(rewards[p, i].item() - sum(others) / 4, abs=1e-6)


def test_adding_a_constant_to_a_group_changes_nothing_and_every_group_sums_to_zero():
    rewards = torch.randn(4, 6, dtype=torch.float64)
    shifted = rewards + torch.tensor([[3.0], [-7.0], [100.0], [0.0]])
    for advantage in (centred, leave_one_out, group_standardised, batch_standardised):
        torch.testing.assert_close(advantage(shifted), advantage(rewards))
        torch.testing.assert_close(advantage(rewards).sum(1), torch.zeros(4, dtype=torch.float64))


def test_scaling_a_group_leaves_its_standardised_advantages():
    rewards = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(group_standardised(rewards * 1000), group_standardised(rewards), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123456.7, -1e-12])
def test_equal_rewards_are_no_signal_whatever_rounding_says(value):
    """A mean of equal float32 numbers need not equal them, and the residue over its own std is enormous."""
    rewards = torch.full((1, 7), value)
    rewards[0, 0] = torch.nextafter(rewards[0, 0], torch.tensor(torch.inf))
    assert zero_variance(rewards).tolist() == [True]
    for advantage in (centred, leave_one_out, group_standardised, batch_standardised):
        assert (advantage(rewards) == 0).all()


def test_small_but_real_differences_count():
    assert zero_variance(torch.tensor([[0.0, 1e-4]])).tolist() == [False]


def test_one_completion_has_no_siblings():
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(1, 1))
    for baseline in ("mean", "batch"):  # nor has one that is all of the batch
        assert standardised(torch.ones(1, 1), baseline=baseline, scale="batch")[0].tolist() == [[0.0]]


def test_the_spread_that_divides_the_rewards_by_hand():
    """Bessel stds 1 and 3 of two groups; the third has none, and gets their root mean square, sqrt(5)."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 3.0, 6.0], [4.0, 4.0, 4.0]])
    assert reward_spread(rewards, "group", eps=0.0).tolist() == pytest.approx([1.0, 3.0, 5**0.5])
    assert reward_spread(rewards, "none").tolist() == [1.0] * 3
    std = (2 * (1 + 9) / 8) ** 0.5  # of -1, 0, 1, -3, 0, 3, 0, 0, 0
    assert reward_spread(rewards, "batch", eps=0.0).tolist() == pytest.approx([std] * 3)
    for scale in ("group", "batch"):  # what divides the rewards where there is something to divide
        values, spread = standardised(rewards, scale=scale)
        torch.testing.assert_close(values * spread.unsqueeze(1), centred(rewards))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_where_no_group_has_a_spread_it_is_one(scale):
    assert reward_spread(torch.full((3, 4), 0.7), scale, eps=0.0).tolist() == [1.0] * 3


# -- the batch as the baseline: REINFORCE++ ----------------------------------------------------------------------------


def test_the_mean_of_the_batch_by_hand():
    """Mean 3.5 and Bessel std of -2.5, -1.5, -0.5, 1.5, 1.5, 1.5: sqrt(15.5 / 5)."""
    assert batch_centred(REWARDS).tolist() == [[-2.5, -1.5, -0.5], [1.5, 1.5, 1.5]]
    values, spread = standardised(REWARDS, baseline="batch", scale="batch")
    assert spread.tolist() == pytest.approx([3.1**0.5 + 1e-4] * 2)
    assert values[0].tolist() == pytest.approx([x / (3.1**0.5 + 1e-4) for x in (-2.5, -1.5, -0.5)])
    single = torch.tensor([[1.0], [4.0]])  # one completion of each prompt
    assert batch_centred(single).tolist() == [[-1.5], [1.5]]
    assert batch_centred(torch.full((2, 3), 0.1)).tolist() == [[0.0] * 3] * 2


def test_the_batch_is_one_group_over_all_ranks_and_without_rewards_that_do_not_apply():
    rewards = torch.randn(4, 5, dtype=torch.float64)
    applies = torch.rand(4, 5) < 0.7
    applies[0, 0], applies[0, 1] = True, False
    rewards = torch.where(applies, rewards, torch.tensor(math.nan, dtype=torch.float64))
    whole = rewards[applies]
    expected = (whole - whole.mean()) / (whole.std() + 1e-4)
    found, _ = standardised(rewards, applies, baseline="batch", scale="batch")
    torch.testing.assert_close(found[applies], expected)
    assert (found[~applies] == 0).all()
    # the same in two halves, each of which is told what the other has
    parts = [(rewards[:2], applies[:2]), (rewards[2:], applies[2:])]
    values = [own[a] for own, a in parts]
    differences = [own[a] - whole.mean() for own, a in parts]
    for (own, a), part in zip(parts, (found[:2], found[2:]), strict=True):
        told = iter([values, differences, values])  # of the spread: twice; of the advantages: once

        def gather(mine, told=told):
            others = next(told)
            assert any(mine.shape == one.shape and torch.allclose(mine, one) for one in others)
            return others

        spread = reward_spread(own, "batch", a, baseline="batch", gather=gather)
        torch.testing.assert_close(relative(own, "batch", a, gather=gather) / spread.unsqueeze(1), part)


def test_with_the_mean_of_the_group_and_the_std_of_the_batch_it_is_the_baseline_form_of_reinforce_plus_plus():
    """r - mean of the group, then standardised over the batch: its mean is 0 already."""
    rewards = torch.randn(6, 4, dtype=torch.float64)
    shaped = rewards - rewards.mean(1, keepdim=True)
    expected = (shaped - shaped.mean()) / (shaped.std() + 1e-4)
    torch.testing.assert_close(standardised(rewards, baseline="mean", scale="batch")[0], expected)


# -- pass@k ------------------------------------------------------------------------------------------------------------


def by_subsets(rewards, k, i, *, holds):
    """The mean of the best of every k completions that hold i, or that do not."""
    n = len(rewards)
    best = [max(rewards[j] for j in s) for s in itertools.combinations(range(n), k) if (i in s) is holds]
    return sum(best) / len(best)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_what_a_completion_adds_to_the_best_of_k_by_enumeration(k):
    rewards = torch.randn(3, 6, dtype=torch.float64)
    rewards[1] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])  # ties
    found = max_of_k(rewards, k)
    for p in range(3):
        row = rewards[p].tolist()
        for i in range(6):
            expected = by_subsets(row, k, i, holds=True) - by_subsets(row, k, i, holds=False)
            assert found[p, i].item() == pytest.approx(5 / 6 * expected, abs=1e-9)
    torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_best_of_one_is_the_reward():
    rewards = torch.randn(4, 5)
    torch.testing.assert_close(max_of_k(rewards, 1), centred(rewards))


def test_for_rewards_of_0_and_1_it_is_the_analytic_advantage():
    """arXiv 2508.10751: with P = 1 - C(neg, k) / C(n, k), right answers get 1 - P and wrong ones
    1 - P - C(neg - 1, k - 1) / C(n - 1, k - 1), here times (n - 1) / (n - k); their std is the scale's business."""
    n, k = 8, 3
    for right in range(1, n):
        wrong = n - right
        found = max_of_k(torch.tensor([[1.0] * right + [0.0] * wrong]), k)[0]
        miss = math.comb(wrong, k) / math.comb(n, k)
        factor = (n - 1) / (n - k)
        assert found[0].item() == pytest.approx(factor * miss, abs=1e-6)
        lost = math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)
        assert found[-1].item() == pytest.approx(factor * (miss - lost), abs=1e-6)


def test_its_expected_gradient_is_that_of_the_best_of_k():
    """Over all groups of four draws from a distribution of three outcomes, with either baseline, against autograd."""
    rewards, k, n = torch.tensor([0.2, 1.0, -0.5], dtype=torch.float64), 2, 4
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    best = sum(p[i] * p[j] * max(rewards[i], rewards[j]) for i in range(3) for j in range(3))
    (wanted,) = torch.autograd.grad(best / k, logits)
    logp = logits.log_softmax(0)
    draws = list(itertools.product(range(3), repeat=n))
    values = max_of_k(rewards[torch.tensor(draws)], k)
    for baseline, factor in (("mean", (n - 1) / n), ("leave_one_out", 1.0)):
        advantages = relative(values, baseline)
        chance = torch.stack([logp.detach()[list(one)].sum().exp() for one in draws])
        terms = [(a * logp[list(one)]).mean() for a, one in zip(advantages, draws, strict=True)]
        (found,) = torch.autograd.grad((chance * torch.stack(terms)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, factor * wanted)


def test_rewards_that_do_not_apply_are_left_out_of_the_best_of_k():
    rewards = torch.tensor([[3.0, math.nan, 1.0, 2.0], [5.0, math.nan, math.nan, 4.0]])
    applies = rewards.isfinite()
    found = max_of_k(rewards, 2, applies)
    torch.testing.assert_close(found[0, [0, 2, 3]], max_of_k(torch.tensor([[3.0, 1.0, 2.0]]), 2)[0])
    assert found[0, 1] == 0
    assert found[1].tolist() == [0.0] * 4  # no more rewards than k
