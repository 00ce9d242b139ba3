"""Losses, elementwise."""

import math

import pytest
import torch

from tether.ops.losses import bradley_terry, clipped_surrogate, clipped_value, likelihood


def test_bradley_terry_literals():
    zero, two = torch.tensor([0.0]), torch.tensor([2.0])
    assert bradley_terry(zero, zero).item() == pytest.approx(math.log(2))
    assert bradley_terry(two, zero).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert bradley_terry(two, zero, margin=2.0).item() == pytest.approx(math.log(2))
    assert bradley_terry(two, zero, centring=0.01).item() == pytest.approx(math.log(1 + math.exp(-2)) + 0.04)


def test_bradley_terry_ignores_a_shift_and_knows_which_side_won():
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(chosen + 5, rejected + 5), bradley_terry(chosen, rejected))
    both = torch.exp(-bradley_terry(chosen, rejected)) + torch.exp(-bradley_terry(rejected, chosen))
    torch.testing.assert_close(both, torch.ones_like(both))


def test_bradley_terry_gradient_is_the_probability_of_being_wrong():
    chosen = torch.randn(9, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(9, dtype=torch.float64)
    bradley_terry(chosen.float(), rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - chosen.detach()), rtol=1e-5, atol=1e-6)


def test_bradley_terry_of_a_hopeless_pair_is_finite():
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.6, True),  # clipped at 1.3
        (1.5, -2.0, 3.0, False),  # a bad token that got likelier is punished in full
        (0.5, 2.0, -1.0, False),  # a good token that got less likely is rewarded in full
        (0.5, -2.0, 1.6, True),  # clipped at 0.8
    ],
)
def test_clipped_surrogate_cases(ratio, advantage, loss, clipped):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found, where = clipped_surrogate(log_ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.3)
    assert found.item() == pytest.approx(loss)
    assert where.item() is clipped
    found.backward()
    assert (log_ratio.grad == 0).item() is clipped  # the flag says where the gradient is cut


def test_on_policy_surrogate_gradient_is_the_policy_gradient():
    log_ratio = torch.zeros(7, requires_grad=True)
    advantages = torch.randn(7)
    clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.2)[0].sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantages)


def test_surrogate_by_a_loop():
    log_ratio, advantages = torch.randn(2, 50)
    found, _ = clipped_surrogate(log_ratio, advantages, clip_low=0.1, clip_high=0.4)
    for x, a, f in zip(log_ratio.tolist(), advantages.tolist(), found.tolist(), strict=True):
        rho = math.exp(x)
        assert f == pytest.approx(max(-a * rho, -a * min(max(rho, 0.9), 1.4)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 1.0, 3.0, 2.0, False),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, True),  # 2.0 counts as 1.2
        (0.0, 1.0, 3.0, 4.5, False),  # moving away is charged in full
    ],
)
def test_clipped_value_cases(value, old, target, loss, clipped):
    found, where = clipped_value(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), clip=0.2)
    assert found.item() == pytest.approx(loss)
    assert where.item() is clipped


def test_clipped_value_is_never_below_the_plain_loss_and_equals_it_for_a_wide_clip():
    values, old, returns = torch.randn(3, 40)
    plain = 0.5 * (values - returns) ** 2
    assert (clipped_value(values, old, returns, clip=0.2)[0] >= plain).all()
    torch.testing.assert_close(clipped_value(values, old, returns, clip=100.0)[0], plain)


def test_likelihood_is_minus_logp():
    assert likelihood(torch.tensor([-1.5, 0.0])).tolist() == [1.5, 0.0]
