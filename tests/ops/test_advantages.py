"""Group-relative advantages."""

import pytest
import torch

from tether.ops.advantages import (
    batch_standardised,
    centred,
    group_standardised,
    leave_one_out,
    reward_spread,
    zero_variance,
)

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
    for advantage in (leave_one_out, group_standardised, batch_standardised):
        with pytest.raises(ValueError, match="at least 2"):
            advantage(torch.ones(1, 1))


def test_the_spread_that_divides_the_rewards_by_hand():
    """Bessel stds 1 and 3 of two groups; the third has none, and gets their root mean square, sqrt(5)."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 3.0, 6.0], [4.0, 4.0, 4.0]])
    assert reward_spread(rewards, "group", eps=0.0).tolist() == pytest.approx([1.0, 3.0, 5**0.5])
    assert reward_spread(rewards, "none").tolist() == [1.0] * 3
    std = (2 * (1 + 9) / 8) ** 0.5  # of -1, 0, 1, -3, 0, 3, 0, 0, 0
    assert reward_spread(rewards, "batch", eps=0.0).tolist() == pytest.approx([std] * 3)
    for scale in ("group", "batch"):  # what divides the rewards where there is something to divide
        standardised = {"group": group_standardised, "batch": batch_standardised}[scale](rewards)
        torch.testing.assert_close(centred(rewards) / reward_spread(rewards, scale).unsqueeze(1), standardised)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_where_no_group_has_a_spread_it_is_one(scale):
    assert reward_spread(torch.full((3, 4), 0.7), scale, eps=0.0).tolist() == [1.0] * 3
