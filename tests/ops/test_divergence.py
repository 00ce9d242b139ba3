"""KL estimators: their values, and which divergence each one's gradient descends."""

import math

import pytest
import torch

from tether.ops.divergence import (
    adapt_kl_coef,
    best_of_n_kl,
    exact_kl,
    k1,
    k2,
    k3,
    kl_penalty,
    kl_slope,
    top_k_of_n_kl,
)

ESTIMATORS = ["k1", "k2", "k3", "k3_corrected"]


def test_literals():
    d = torch.tensor([0.0, 1.0, -2.0])
    assert k1(d).tolist() == [0, 1, -2]
    assert k2(d).tolist() == [0, 0.5, 2]
    expected = [0, math.exp(-1), math.exp(2) - 3]
    assert k3(d).tolist() == pytest.approx(expected, rel=1e-6)
    assert exact_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )


def distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    reference = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    return logits, reference


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    logits, reference = distributions()
    logp = logits.log_softmax(-1)
    d = logp - reference
    exact = exact_kl(logp, reference)
    for estimator in (k1, k3):
        torch.testing.assert_close((logp.exp() * estimator(d)).sum(), exact, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert (k3(d) >= 0).all()
    assert exact == pytest.approx(
        sum(math.exp(p) * (p - q) for p, q in zip(logp.tolist(), reference.tolist(), strict=True))
    )


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [("k1", "nothing"), ("k2", "reverse"), ("k3", "forward"), ("k3_corrected", "reverse")],
)
def test_gradient_as_a_loss_by_enumeration(estimator, divergence):
    """The expectation over samples held fixed, differentiated, against the gradient of the divergence itself."""
    logits, reference = distributions()
    logits.requires_grad_()
    logp = logits.log_softmax(-1)
    weights = logp.exp().detach()
    loss = (weights * kl_penalty(estimator, logp - reference, logp - logp.detach())).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    exact = {
        "reverse": lambda: exact_kl(logp, reference),
        "forward": lambda: exact_kl(reference, logp),
        "nothing": lambda: 0.0 * logits.sum(),
    }[divergence]()
    (expected,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_slope_is_the_weight_of_the_score_in_that_gradient(estimator):
    logits, reference = distributions()
    logits.requires_grad_()
    logp = logits.log_softmax(-1)
    loss = kl_penalty(estimator, logp - reference, logp - logp.detach())
    for i in range(len(logits)):
        (by_loss,) = torch.autograd.grad(loss[i], logits, retain_graph=True)
        (score,) = torch.autograd.grad(logp[i], logits, retain_graph=True)
        slope = kl_slope(estimator, (logp - reference)[i])
        torch.testing.assert_close(by_loss, slope * score, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_very_negative_d_stays_finite():
    d = torch.tensor([-1000.0], dtype=torch.bfloat16)
    for estimator in ESTIMATORS:
        assert torch.isfinite(kl_penalty(estimator, d, -d)).all()
        assert torch.isfinite(kl_slope(estimator, d)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("beyond", [-10.5, -12.0, -40.0])
def test_beyond_the_bound_of_the_exponent_the_gradient_keeps_its_sign(estimator, beyond):
    """A token that the policy has all but given up, and the reference has not, is still pulled back."""
    logp = torch.tensor(beyond, requires_grad=True)
    (found,) = torch.autograd.grad(kl_penalty(estimator, logp - 0.0, logp - logp.detach()), logp)
    expected = {"k1": 1.0, "k2": beyond, "k3": 1 - math.exp(10), "k3_corrected": beyond}[estimator]
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert kl_slope(estimator, logp).item() == pytest.approx(expected, rel=1e-5)


def test_corrected_k3_is_k3_times_the_ratio():
    d, log_ratio = torch.tensor([0.7, -2.0, 0.0]), torch.tensor([0.3, -0.4, 1.0])
    expected = [math.exp(r) * (math.exp(-x) - 1 + x) for x, r in zip(d.tolist(), log_ratio.tolist(), strict=True)]
    assert kl_penalty("k3_corrected", d, log_ratio).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_outcomes_that_never_happen_cost_nothing():
    p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert exact_kl(p, q).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("n", "nats"), [(1, 0), (2, 0.1931), (4, 0.6363), (16, 1.8351), (64, 3.1745), (1000, 5.9088)])
def test_best_of_n_table(n, nats):
    assert best_of_n_kl(n) == pytest.approx(nats, abs=5e-5)


def test_best_of_zero_is_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="k <= n"):
        top_k_of_n_kl(3, 2)


def test_top_k_of_n_between_its_two_ends():
    for n in (2, 5, 16):
        assert top_k_of_n_kl(1, n) == best_of_n_kl(n)
        assert top_k_of_n_kl(n, n) == pytest.approx(0, abs=1e-9)
        chain = [top_k_of_n_kl(k, n) for k in range(1, n + 1)]
        assert chain == sorted(chain, reverse=True)


def test_top_k_of_n_against_a_histogram():
    """Draw it: the quantile of a uniform pick among the 2 best of 5, and the entropy of its histogram."""
    generator = torch.Generator().manual_seed(0)
    best = torch.rand(400_000, 5, generator=generator, dtype=torch.float64).topk(2).values.flatten()
    density = torch.histc(best, bins=100, min=0, max=1) / len(best) * 100
    kl = (density * density.clamp(min=1e-12).log()).mean().item()
    assert top_k_of_n_kl(2, 5) == pytest.approx(kl, abs=3e-3)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 256 / 10_000)),
        (60.0, 0.15 * (1 + 0.2 * 256 / 10_000)),  # the error is bounded at 0.2
        (0.0, 0.15 * (1 - 0.2 * 256 / 10_000)),
    ],
)
def test_adaptive_kl_rule(kl, expected):
    found = adapt_kl_coef(0.15, kl, target=6.0, samples=256, horizon=10_000)
    assert found == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_never_turns_the_sign():
    assert adapt_kl_coef(0.15, 0.0, target=6.0, samples=256, horizon=10) == pytest.approx(0.15 * 0.8)


def test_adaptive_kl_settles_where_kl_meets_the_target():
    """A plant whose KL falls as the coefficient rises, kl = 1 / coef, is driven to kl = target."""
    coef = 0.15
    for _ in range(5000):
        coef = adapt_kl_coef(coef, 1 / coef, target=4.0, samples=256, horizon=10_000)
    assert 1 / coef == pytest.approx(4.0, rel=1e-3)


def test_k3_has_one_slope_where_the_exponential_ends_and_its_tangent_begins():
    d = torch.tensor([-10.5, -10.0, -9.999], requires_grad=True)
    k3(d).sum().backward()
    expected = [1 - math.exp(10), 1 - math.exp(10), 1 - math.exp(9.999)]
    assert d.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert kl_slope("k3", d).tolist() == pytest.approx(expected, rel=1e-5)


def simpson(k, n, nodes=400_000):
    """KL of the best k of n by Simpson's rule over v = exp(-x), where the density is smooth for every n."""
    x = torch.linspace(1e-9, 40.0, nodes + 1, dtype=torch.float64)
    v = (-x).exp().clamp(max=1 - 1e-16)
    below = torch.stack(
        [
            math.lgamma(n) - math.lgamma(j + 1) - math.lgamma(n - j) + j * v.log() + (n - 1 - j) * torch.log1p(-v)
            for j in range(k)
        ]
    ).logsumexp(0)
    log_f = math.log(n / k) + below
    integrand = log_f.exp() * log_f * v
    weights = torch.ones(nodes + 1, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((integrand * weights).sum() * (x[1] - x[0]) / 3)


@pytest.mark.parametrize(("k", "n"), [(2, 4), (4, 16), (2, 1024), (16, 1024), (3, 100_000)])
def test_top_k_of_n_by_another_quadrature(k, n):
    assert top_k_of_n_kl(k, n) == pytest.approx(simpson(k, n), abs=1e-3)


def test_the_closed_form_serves_any_n():
    assert top_k_of_n_kl(1, 10**6) == pytest.approx(math.log(10**6) - 1, abs=1e-5)
    assert simpson(1, 4096) == pytest.approx(best_of_n_kl(4096), abs=1e-6)  # and so does the other quadrature


def test_rounds_of_best_of_n_are_best_of_n_to_the_power():
    assert top_k_of_n_kl(1, 4, rounds=2) == best_of_n_kl(16) == pytest.approx(1.8351, abs=1e-4)
    assert top_k_of_n_kl(4, 4, rounds=5) == 0


@pytest.mark.parametrize(("k", "n", "rounds"), [(2, 4, 2), (2, 4, 3), (3, 5, 2)])
def test_rounds_of_top_k_of_n_against_a_simulation(k, n, rounds):
    """A finite population stands for pi_ref: its shares after each round are exact, up to the size of a cell."""
    cells = 20_000
    v = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells  # share that scores higher
    p = torch.full_like(v, 1 / cells)
    for _ in range(rounds):
        above = p.cumsum(0) - p / 2
        chance = sum(
            math.comb(n - 1, j) * above**j * (1 - above) ** (n - 1 - j) for j in range(k)
        )  # that fewer than k of the n - 1 others score higher
        p = p * n / k * chance
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    assert top_k_of_n_kl(k, n, rounds=rounds) == pytest.approx(float((p * (p * cells).log()).sum()), abs=2e-3)
