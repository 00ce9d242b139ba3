"""DPO: its losses by hand, its step against a naive loop, and the optimum that its pairs imply."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from enumerable import PROMPT, Space, tiny_llama, total_variation
from helpers import relative_error, step_gradient
from tether.algorithms import dpo
from tether.algorithms.optimise import Guard, Optim
from tether.data.batching import Cursor
from tether.errors import ConfigError, GuardError
from tether.models.adapters import Lora, add_adapter
from tether.models.loading import load_policy
from tether.ops.losses import preference_loss
from tether.types import PreferencePair

BETA = 0.5
TOLERANCE = 0.03
VOCAB, LENGTH, SEED = 8, 2, 1


# ----------------------------------------------------------------------------------------------------------- the losses


def test_literals():
    d = torch.tensor([0.0, 2.0, -1.0])
    found = preference_loss(d, beta=0.5)
    expected = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(0.5))]
    assert found.tolist() == pytest.approx(expected)
    # h = 1: 0.9 * 0.3132617 + 0.1 * 1.3132617
    assert preference_loss(d[1], beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.4132617)
    assert preference_loss(d, beta=0.5, kind="ipo").tolist() == pytest.approx([1.0, 1.0, 4.0])
    assert preference_loss(d, beta=0.5, kind="hinge").tolist() == pytest.approx([1.0, 0.0, 1.5])


def test_a_margin_is_in_units_of_the_reward():
    d, margin = torch.tensor([2.0]), torch.tensor([0.25])
    for kind in ("sigmoid", "hinge"):
        shifted = preference_loss(d - margin / 0.5, beta=0.5, kind=kind)
        torch.testing.assert_close(preference_loss(d, margin, beta=0.5, kind=kind), shifted)


def test_smoothing_is_least_where_the_mixed_preference_is():
    """With p the share of pairs whose first side is preferred, sigma(h) = p (1 - e) + (1 - p) e."""
    p, e, beta = 0.9, 0.2, 0.3
    d = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([d], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = p * preference_loss(d, beta=beta, label_smoothing=e)
        loss = (loss + (1 - p) * preference_loss(-d, beta=beta, label_smoothing=e)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.sigmoid(beta * d).item() == pytest.approx(p * (1 - e) + (1 - p) * e, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing needs loss sigmoid"),
        ({"sft_coef": -1.0}, "sft_coef must be 0 or more"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        dpo.Config(**options)


# ------------------------------------------------------------------------------------------------------------- the step


def pair(prompt, chosen, rejected, margin=0.0):
    return PreferencePair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, margin=margin)


PAIRS = [
    pair((0, 70, 71), (9, 200, 1), (9, 1)),
    pair((0, 70, 71), (5, 1), (31, 8, 7, 1), margin=0.4),
    pair((0, 80), (60, 61, 62, 1), (1,)),
    pair((0,), (90, 1), (91, 1)),
]
CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "mean": {"length_normalise": True, "beta": 2.0},
    "sft": {"sft_coef": 0.7},
}


def naive_logprob(model, prompt, completion):
    """Sum over the completion's tokens, one forward pass of the library per row."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    first = max(1, len(prompt))
    ids = [*prompt, *completion]
    return sum(logits[t - 1, ids[t]] for t in range(first, len(ids)))


def naive_loss(model, pairs, reference, config):
    """The mean over pairs of the formulas of the page, pair by pair."""
    total = 0.0
    for row, (ref_w, ref_l) in zip(pairs, reference, strict=True):
        logp_w = naive_logprob(model, row.prompt_ids, row.chosen_ids)
        s_w, s_l = logp_w - ref_w, naive_logprob(model, row.prompt_ids, row.rejected_ids) - ref_l
        if config.length_normalise:
            s_w, s_l = s_w / len(row.chosen_ids), s_l / len(row.rejected_ids)
        h = config.beta * (s_w - s_l) - row.margin
        if config.loss == "sigmoid":
            e = config.label_smoothing
            one = -(1 - e) * torch.log(torch.sigmoid(h)) - e * torch.log(torch.sigmoid(-h))
        elif config.loss == "ipo":
            one = (h / config.beta - 1 / (2 * config.beta)) ** 2
        else:
            one = torch.clamp(1 - h, min=0)
        total = total + one - config.sft_coef * logp_w / len(row.chosen_ids)
    return total / len(pairs)


def gradient_of(policy, pairs, config, budget=8192):
    found = {}

    def run(optimizer):
        guard = Guard(token_budget=budget)
        state = dpo.State(policy=policy, optimizer=optimizer, cursor=Cursor(8, 0), guard=guard, total_steps=1)
        found.update(dpo.step(state, pairs, config=replace(config, optim=Optim(max_grad_norm=1e9))).metrics)

    gradient = step_gradient(policy, run)
    return found, gradient


@pytest.fixture
def policies(tiny):
    """The policy, and the reference: another model with its weights moved."""
    policy, _ = load_policy(tiny)
    reference, _ = load_policy(tiny)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return policy, reference


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_naive_loop(name, policies):
    policy, reference = policies
    config, pairs = dpo.Config(**CASES[name]), PAIRS
    referred = dpo.refer(reference, pairs)
    with torch.no_grad():
        expected_ref = [
            [float(naive_logprob(reference, p.prompt_ids, side)) for side in (p.chosen_ids, p.rejected_ids)]
            for p in pairs
        ]
    for one, (chosen, rejected) in zip(referred, expected_ref, strict=True):
        assert (one.ref_chosen, one.ref_rejected) == pytest.approx((chosen, rejected), abs=1e-4)
    metrics, found = gradient_of(policy, referred, config)
    policy.zero_grad()
    loss = naive_loss(policy, pairs, expected_ref, config)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert relative_error(found, expected) < 1e-3


def test_the_figures_are_those_of_trl(policies):
    policy, reference = policies
    config, pairs = dpo.Config(beta=0.2), PAIRS
    referred = dpo.refer(reference, pairs)
    metrics, _ = gradient_of(policy, referred, config)
    own = dpo.pair_logprobs(policy, pairs, token_budget=8192).double()
    theirs = torch.tensor([[p.ref_chosen, p.ref_rejected] for p in referred]).double().T
    chosen, rejected = 0.2 * (own - theirs)
    assert metrics["rewards/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())
    assert metrics["logps/chosen"] == pytest.approx(own[0].mean().item(), abs=1e-4)
    evaluated = dpo.evaluate(policy, referred, config=config, token_budget=8192)
    assert evaluated["eval/loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert evaluated["eval/rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-5)
    judged = dpo.judge(policy, referred, config=config, token_budget=8192)
    assert judged.accuracy == pytest.approx(metrics["rewards/accuracies"])


@pytest.mark.parametrize("name", ["sigmoid", "mean", "sft"])
def test_the_gradient_depends_on_neither_the_micro_batches_nor_the_order(name, policies):
    policy, reference = policies
    config, referred = dpo.Config(**CASES[name]), dpo.refer(reference, PAIRS)
    _, whole = gradient_of(policy, referred, config)
    for budget, order in ((1, [0, 1, 2, 3]), (12, [3, 1, 0, 2]), (8192, [2, 3, 1, 0])):
        _, found = gradient_of(policy, [referred[i] for i in order], config, budget)
        assert relative_error(found, whole) < 1e-5


def test_before_the_first_step_policy_and_reference_are_one(tiny):
    policy, _ = load_policy(tiny)
    state = dpo.State.create(policy, len(PAIRS), dpo.Config(epochs=2.0, batch_size=2), seed=0)
    rows = [row.metrics for row in dpo.steps(state, PAIRS, PAIRS[:1], config=dpo.Config(epochs=2.0, batch_size=2))]
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert [("eval/loss" in row) for row in rows] == [False, True, False, True]
    assert state.ref_logp.shape == (2, 4)


def test_a_log_prob_of_the_reference_that_is_not_finite_is_an_error(tiny):
    policy, _ = load_policy(tiny)
    with torch.no_grad():
        policy.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GuardError, match="log-prob of the reference"):
        dpo.refer(policy, PAIRS)


# --------------------------------------------------------------------------------------------------------- the optimum


@pytest.fixture(scope="module")
def problem():
    """The space, the log-probs of the reference, and P(i preferred to j) of Bradley and Terry."""
    space = Space.of(VOCAB, LENGTH, seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(tiny_llama(VOCAB, seed=SEED))
    wins = torch.sigmoid(space.rewards[:, None] - space.rewards[None, :])
    return space, reference, wins


def minimised(problem, **options):
    """The distribution at the least of the loss over pairs of completions that the reference draws, by the exact
    gradient."""
    space, reference, wins = problem
    drawn = reference.exp()[:, None] * reference.exp()[None, :]
    model = tiny_llama(VOCAB, seed=SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 300)
    for _ in range(300):
        s = space.logprobs(model) - reference
        loss = (drawn * wins * preference_loss(s[:, None] - s[None, :], beta=BETA, **options)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return space.logprobs(model).exp().detach()


def test_the_least_sigmoid_loss_is_the_optimum_of_the_reward_less_the_kl(problem):
    space, reference, _ = problem
    optimum = space.reverse_optimum(reference, BETA)
    assert total_variation(optimum, reference.exp()) > 2.5 * TOLERANCE
    assert total_variation(minimised(problem), optimum) < TOLERANCE


def test_the_least_ipo_loss_is_its_closed_form(problem):
    """With t_ij = (2 p_ij - 1) / (2 beta), sum over pairs of w_i w_j (s_i - s_j - t_ij)^2 is least for
    s_i = sum over j of w_j t_ij + c."""
    space, reference, wins = problem
    expected = (reference + (2 * wins - 1) / (2 * BETA) @ reference.exp()).softmax(0)
    assert total_variation(expected, space.reverse_optimum(reference, BETA)) > TOLERANCE
    assert total_variation(minimised(problem, kind="ipo"), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 128])
def test_training_on_drawn_pairs_lands_on_the_optimum(rank):
    """20,000 pairs, in the shares that the reference draws them in and Bradley and Terry expect, less those of two
    equal sides; with all weights, and with an adapter of full rank."""
    space, model = Space.of(5, LENGTH, seed=SEED), tiny_llama(5, seed=SEED)
    with torch.no_grad():
        reference = space.logprobs(model)
    wins = torch.sigmoid(space.rewards[:, None] - space.rewards[None, :])
    counts = (20_000 * reference.exp()[:, None] * reference.exp()[None, :] * wins).round().int().fill_diagonal_(0)
    rows = [(i, j) for i, j in counts.nonzero().tolist() for _ in range(counts[i, j])]
    pairs = [pair(PROMPT, space.completions[i], space.completions[j]) for i, j in rows]
    if rank:
        add_adapter(model, Lora(lora_rank=rank), seed=0)
    config = dpo.Config(beta=BETA, epochs=16.0, batch_size=1024, micro_batch_tokens=65536)
    config = replace(config, optim=Optim(learning_rate=1e-3))
    state = dpo.State.create(model, len(pairs), config, seed=0)
    for _ in dpo.steps(state, pairs, config=config):
        pass
    with torch.no_grad():
        found = space.logprobs(model).exp()
    optimum = space.reverse_optimum(reference, BETA)
    assert total_variation(optimum, reference.exp()) > 5 * TOLERANCE
    assert total_variation(found, optimum) < TOLERANCE
