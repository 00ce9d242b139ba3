"""Losses, elementwise."""

import math

import pytest
import torch

from tether.algorithms.surrogate import Surrogate, surrogate_of
from tether.ops.losses import (
    LossInputs,
    ValueInputs,
    bradley_terry,
    clipped_value,
    grpo_loss,
    grpo_terms,
    kl_terms,
    negative_log_likelihood,
    ppo_loss,
)


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


def test_negative_log_likelihood_is_minus_logp():
    assert negative_log_likelihood(torch.tensor([-1.5, 0.0])).tolist() == [1.5, 0.0]


def inputs(shape=(2, 3), *, seed=0, **given):
    """Random loss inputs; the last token of the last row was not emitted."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[-1, -1] = False
    names = ("logp", "old_logp", "sampler_logp", "ref_logp", "entropy", "advantages")
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in names}
    return LossInputs(**{**tensors, "mask": mask, **given})


def test_ppo_loss_worked_by_hand():
    """One token: rho = 1.5 is clipped at 1.2 against A = 2; the value 1.0 is 2 below its return; entropy 0.7."""
    log_ratio = math.log(1.5)
    one = torch.ones(1, 1)
    policy = LossInputs(
        logp=one * (log_ratio - 1),
        old_logp=-one,
        sampler_logp=-one,
        ref_logp=one * math.nan,  # PPO pays the KL in its rewards
        entropy=one * 0.7,
        advantages=one * 2,
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    value = ValueInputs(values=one, old_values=one, returns=one * 3)
    surrogate = surrogate_of(policy, Surrogate(clip_low=0.1))
    options = {"value_clip": 0.2, "value_coef": 0.5}
    found = ppo_loss(surrogate, policy, value, entropy_coef=0.1, **options)
    assert found.loss.item() == pytest.approx(-2.4 + 0.5 * 2.0 - 0.1 * 0.7)
    figures = {name: float(x) for name, x in found.figures.items()}
    expected = {"loss/policy": -2.4, "loss/value": 2.0, "entropy": 0.7, "val/ratio": 1.5}
    assert figures == pytest.approx(expected | {"policy/clipfrac": 1.0, "val/clipfrac": 0.0})
    assert ppo_loss(surrogate, policy, value, entropy_coef=0.0, **options).loss.item() == pytest.approx(-1.4)


GRPO = {"kl_weight": 0.4, "kl_estimator": "k2"}


def grpo(one, *, ratio_level="token", **options):
    surrogate = surrogate_of(one, Surrogate(clip_high=0.3), ratio_level=ratio_level)
    return grpo_loss(grpo_terms(surrogate, one.advantages), one, **{**GRPO, "kl_level": "token", **options})


def test_grpo_loss_by_a_loop():
    one = inputs()
    for level in ("token", "sequence"):
        found = grpo(one, ratio_level=level).loss
        for b in range(2):
            emitted = [t for t in range(3) if one.mask[b, t]]
            log_ratios = [float(one.logp[b, t] - one.old_logp[b, t]) for t in range(3)]
            mean = sum(log_ratios[t] for t in emitted) / len(emitted)
            for t in emitted:
                rho = math.exp(log_ratios[t] if level == "token" else mean)
                a, d = float(one.advantages[b, t]), float(one.logp[b, t] - one.ref_logp[b, t])
                expected = max(-a * rho, -a * min(max(rho, 0.8), 1.3)) + 0.4 * d * d / 2
                assert found[b, t].item() == pytest.approx(expected)


def test_the_kl_term_at_the_sequence_level_by_hand():
    """k2 of a completion: (sum of d)^2 / 2, shared out evenly over its emitted tokens; one of row 1 is not."""
    zero = torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    logp = torch.tensor([[1.0, -0.5, 0.25], [2.0, 99.0, 1.0]])
    one = inputs(logp=logp, old_logp=zero, ref_logp=zero, mask=mask)
    found = kl_terms(one, estimator="k2", level="sequence")
    assert found[0].tolist() == pytest.approx([0.75**2 / 2 / 3] * 3)
    assert found[1, [0, 2]].tolist() == pytest.approx([4.5 / 2] * 2)
    token = kl_terms(one, estimator="k2", level="token")
    assert token[0].tolist() == pytest.approx([0.5, 0.125, 0.03125])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_that_were_not_emitted_reach_no_other_tokens_loss(level):
    clean = inputs()
    spoilt = inputs(
        **{name: torch.where(clean.mask, getattr(clean, name), 1e6) for name in ("logp", "old_logp", "ref_logp")}
    )
    loss = [grpo(one, ratio_level=level, kl_level=level).loss[clean.mask] for one in (clean, spoilt)]
    torch.testing.assert_close(loss[0], loss[1])


def test_each_completion_may_have_its_own_weight_of_the_kl():
    one = inputs()
    weights = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    found = grpo(one, kl_level="sequence", kl_weight=weights).loss
    for b, weight in enumerate((0.5, 2.0)):
        assert torch.equal(found[b], grpo(one, kl_level="sequence", kl_weight=weight).loss[b])


def test_the_entropy_bonus_of_grpo_is_taken_from_every_token():
    one = inputs()
    plain, found = grpo(one), grpo(one, entropy_coef=0.3)
    torch.testing.assert_close(found.loss, plain.loss - 0.3 * one.entropy)


def test_a_completion_outside_of_the_loss_leaves_a_finite_gradient():
    """At the sequence level its KL has no tokens to be shared by."""
    logp = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for level in ("token", "sequence"):
        (gradient,) = torch.autograd.grad(grpo(inputs(logp=logp, mask=mask), kl_level=level).loss[mask].sum(), logp)
        assert gradient.isfinite().all()
        assert (gradient[0, :2] != 0).all()
        assert (gradient[1] == 0).all()
