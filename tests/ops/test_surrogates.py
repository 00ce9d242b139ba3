"""Surrogates of the policy's objective, weights against a sampler's mismatch, and the entropy's controller."""

import math

import pytest
import torch

from tether.ops.surrogates import (
    adapt_entropy_coef,
    cispo,
    clipped_surrogate,
    entropy_price,
    mismatch_weights,
    sapo,
    surrogate,
)

OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": None, "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05}


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
    ("ratio", "advantage", "loss", "clipped"),
    [
        (2.9, -2.0, 5.8, False),
        (5.0, -2.0, 6.0, True),  # counts as 3
        (5.0, 2.0, -2.6, True),  # the dual bound is no matter of A > 0
        (0.5, -2.0, 1.6, True),  # nor of a small ratio
        (0.5, 2.0, -1.0, False),
    ],
)
def test_dual_clip_cases(ratio, advantage, loss, clipped):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found, where = clipped_surrogate(log_ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.3, clip_dual=3.0)
    assert found.item() == pytest.approx(loss)
    assert where.item() is clipped
    found.backward()
    assert (log_ratio.grad == 0).item() is clipped


def test_dual_clip_and_the_two_sided_clip_are_one_function():
    """As their papers write them, objectives to maximise: Ye et al. bound it by c A from below where A < 0, INTELLECT-2
    bounds the ratio of the unclipped branch by delta. Also at the smallest bound that is allowed, 1 + clip_high."""
    log_ratio, advantages = 2 * torch.randn(2, 400, dtype=torch.float64)
    ratio = log_ratio.exp()
    for bound in (1.3, 2.0, 5.0):
        plain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
        dual = torch.where(advantages < 0, torch.maximum(plain, bound * advantages), plain)
        two_sided = torch.minimum(ratio.clamp(max=bound) * advantages, ratio.clamp(0.8, 1.3) * advantages)
        found, _ = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.3, clip_dual=bound)
        torch.testing.assert_close(found, -dual)
        torch.testing.assert_close(found, -two_sided)
        assert (found != clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.3)[0]).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [
        (1.0, 2.0, 1.0, False),
        (0.1, 2.0, 0.1, False),
        (0.1, -2.0, 0.1, False),
        (9.0, 2.0, 5.0, True),
        (9.0, -2.0, 5.0, True),
    ],
)
def test_cispo_by_hand(ratio, advantage, weight, clipped):
    """The weight is bounded above alone, for either sign, and no gradient is dropped."""
    logp = torch.tensor([-0.7], requires_grad=True)
    log_ratio = logp + 0.7 + math.log(ratio)
    found, where = cispo(log_ratio, logp, torch.tensor([advantage]), clip_high=4.0)
    assert found.item() == pytest.approx(0.7 * weight * advantage)
    assert where.item() is clipped
    found.backward()
    assert logp.grad.item() == pytest.approx(-weight * advantage)


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_sapo_by_hand(advantage):
    """At rho = 2: 4 sigmoid(1) for A > 0, 4 / 1.05 sigmoid(1.05) otherwise; the slope is 4 p (1 - p) rho."""
    tau = 1.0 if advantage > 0 else 1.05
    gate = 1 / (1 + math.exp(-tau))
    log_ratio = torch.tensor([math.log(2.0)], requires_grad=True)
    found, clipped = sapo(log_ratio, torch.tensor([advantage]), tau_pos=1.0, tau_neg=1.05)
    assert found.item() == pytest.approx(-4 / tau * gate * advantage)
    assert not clipped.any()
    found.backward()
    assert log_ratio.grad.item() == pytest.approx(-4 * gate * (1 - gate) * 2.0 * advantage)


def test_sapos_gate_closes_far_from_one_on_both_sides():
    log_ratio = torch.tensor([-20.0, 0.0, 4.0], requires_grad=True)
    sapo(log_ratio, torch.ones(3), tau_pos=1.0, tau_neg=1.0)[0].sum().backward()
    assert log_ratio.grad[1] == pytest.approx(-1.0)
    assert log_ratio.grad[[0, 2]].abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["clip", "cispo", "sapo"])
def test_on_policy_every_surrogate_has_the_policy_gradient(kind):
    logp = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(7, dtype=torch.float64)
    found = surrogate(kind, logp - logp.detach(), logp, advantages, **OPTIONS)
    found.loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)
    assert (found.ratio == 1).all()
    assert not found.clipped.any()


def test_a_surrogate_by_name_is_that_surrogate():
    log_ratio, logp, advantages = torch.randn(3, 30)
    by_name = {kind: surrogate(kind, log_ratio, logp, advantages, **OPTIONS).loss for kind in ("clip", "cispo", "sapo")}
    assert torch.equal(by_name["clip"], clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.3)[0])
    assert torch.equal(by_name["cispo"], cispo(log_ratio, logp, advantages, clip_high=0.3)[0])
    assert torch.equal(by_name["sapo"], sapo(log_ratio, advantages, tau_pos=1.0, tau_neg=1.05)[0])


W = torch.tensor([[0.5, 1.0, 3.0], [2.0, 2.5, 9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("kind", "level", "expected", "over"),
    [
        ("tis", "token", [[0.5, 1.0, 2.0], [2.0, 2.0]], [[0, 0, 1], [0, 1]]),
        ("mis", "token", [[0.5, 1.0, 0.0], [2.0, 0.0]], [[0, 0, 1], [0, 1]]),
        ("tis", "sequence", [[1.5] * 3, [2.0] * 2], [[0, 0, 0], [1, 1]]),  # products 1.5 and 5: 9 is not the policy's
        ("mis", "sequence", [[1.5] * 3, [0.0] * 2], [[0, 0, 0], [1, 1]]),
    ],
)
def test_mismatch_weights_by_hand(kind, level, expected, over):
    found, capped = mismatch_weights(W.log(), MASK, kind=kind, level=level, cap=2.0)
    for b, row in enumerate(expected):
        assert found[b, : len(row)].tolist() == pytest.approx(row)
        assert capped[b, : len(row)].tolist() == over[b]


def test_weights_without_a_cap_make_an_expectation_under_the_sampler_one_under_the_policy():
    """Exactly, over an enumerated space of two tokens each of three kinds: at the sequence level for a reward of whole
    completions, and not at the token level."""
    generator = torch.Generator().manual_seed(0)
    policy, sampler = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    space = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logp, drawn = (one.gather(1, space.T).T for one in (policy, sampler))
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    everywhere = torch.ones(9, 2, dtype=torch.bool)
    wanted = (logp.sum(1).exp() * rewards).sum()
    found = {}
    for level in ("sequence", "token"):
        weights, _ = mismatch_weights(logp - drawn, everywhere, kind="tis", level=level, cap=math.inf)
        found[level] = (drawn.sum(1).exp() * weights[:, 0] * rewards).sum()
    torch.testing.assert_close(found["sequence"], wanted)
    assert abs(found["token"] - wanted) > 0.01


def test_where_sampler_and_trainer_agree_the_weights_are_one_and_no_gradient_flows():
    logp = torch.randn(2, 3, requires_grad=True)
    for level in ("token", "sequence"):
        weights, over = mismatch_weights(logp - logp.detach(), MASK, kind="mis", level=level, cap=2.0)
        assert (weights == 1).all()
        assert not weights.requires_grad
        assert not over.any()


def test_a_weight_that_overflows_is_capped_or_masked():
    far = torch.full((1, 3), 1e4)
    for kind, expected in (("tis", 2.0), ("mis", 0.0)):
        for level in ("token", "sequence"):
            found, over = mismatch_weights(far, MASK[:1], kind=kind, level=level, cap=2.0)
            assert found.tolist() == [[expected] * 3]
            assert over.all()


def test_the_entropys_coefficient_rises_below_its_target_and_falls_above_it():
    coef, seen = 0.004, []
    for entropy in (1.0, 0.5, 0.4, 0.4, 0.6):
        seen.append(round(entropy_price(coef, entropy, target=0.5), 6))
        coef = adapt_entropy_coef(coef, entropy, target=0.5, step=0.01)
    assert seen == [0.0, 0.0, 0.01, 0.02, 0.0]  # above the target it does not apply at all
    assert coef == pytest.approx(0.02)
    assert adapt_entropy_coef(0.004, 1.0, target=0.5, step=0.01) == 0.0


def test_without_a_target_the_coefficient_is_what_it_is_and_with_one_it_waits_for_the_first_entropy():
    assert entropy_price(0.3, 5.0, target=None) == 0.3
    assert entropy_price(0.3, None, target=None) == 0.3
    assert entropy_price(0.3, None, target=9.0) == 0.0
