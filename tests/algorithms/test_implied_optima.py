"""Options of the loss move the optimum to where they say, and nowhere else: completions of one token, which is fast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from enumerable import PROMPT, Space, tiny_llama, total_variation
from implied import above_the_mean, best_of, fixed_point, plain, with_entropy
from optima import BETA, SEED, VOCAB, sampler
from tether.algorithms import grpo
from tether.algorithms.surrogate import Surrogate
from tether.models.reference import reference_of
from tether.types import Prompt, Sampling

ALPHA, NEAR, APART = 0.5, 0.02, 0.05
SPACE = Space.of(VOCAB, 1, seed=SEED + 2, spread=1.0)
PLAIN = plain(BETA)
CASES = {
    "sapo": ({"surrogate": Surrogate(policy_loss="sapo")}, PLAIN),
    "positive-only": ({"positive_only": True}, fixed_point(above_the_mean, BETA)),
    "pass@3": ({"pass_at_k": 3}, fixed_point(best_of(3), BETA)),
    "entropy": ({"entropy_coef": ALPHA}, with_entropy(ALPHA, BETA)),
}


def train(steps=60, **options):
    model = tiny_llama(VOCAB, seed=SEED)
    with torch.no_grad():
        reference = SPACE.logprobs(model)
    config = grpo.Config(
        **{"advantage_scale": "none", **options},
        group_size=128,
        kl_coef=BETA,
        epochs_per_step=2,
        sampling=Sampling(max_new_tokens=1),
        optim=replace(grpo.Config().optim, learning_rate=1e-3),
    )
    state = grpo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=steps, seed=0)
    engine = sampler(model)
    for _ in range(steps):
        grpo.step(state, [Prompt(ids=PROMPT, text="")] * 2, generator=engine, scorer=SPACE, config=config)
    with torch.no_grad():
        return SPACE.logprobs(model).exp(), reference


@pytest.mark.parametrize(("options", "optimum"), CASES.values(), ids=CASES.keys())
def test_a_loss_lands_on_the_optimum_that_it_implies(options, optimum):
    found, reference = train(**options)
    assert total_variation(found, optimum(SPACE, reference)) < NEAR
    assert total_variation(reference.exp(), optimum(SPACE, reference)) > APART
    for other in (PLAIN, *(own for _, own in CASES.values())):
        if other is not optimum:
            assert total_variation(found, other(SPACE, reference)) > APART


def test_the_optimum_with_entropy_is_the_closed_form_for_one_token():
    """(pi_ref^beta exp(r))^(1 / (alpha + beta)) / Z, and without the bonus the plain one, for two tokens as well."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2):
        space = Space.of(4, length, seed=0)
        reference = torch.randn(len(space.completions), generator=generator, dtype=torch.float64).log_softmax(0)
        torch.testing.assert_close(with_entropy(0.0, BETA)(space, reference), PLAIN(space, reference))
        closed = ((BETA * reference + space.rewards) / (ALPHA + BETA)).softmax(0)
        assert torch.allclose(with_entropy(ALPHA, BETA)(space, reference), closed) is (length == 1)


def test_the_best_of_k_is_the_optimum_of_its_objective():
    """pi = pi_ref exp(value / beta) / Z maximises E[max of k draws] / k - beta KL, here by gradient ascent."""
    reference = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(0)
    rewards, k = SPACE.rewards, 3
    logits = reference.clone().requires_grad_()
    order = rewards.argsort()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        logp = logits.log_softmax(0)
        at_most = logp.exp()[order].cumsum(0) ** k
        best = (at_most.diff(prepend=torch.zeros(1, dtype=torch.float64)) * rewards[order]).sum()
        loss = -best / k + BETA * (logp.exp() * (logp - reference)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = fixed_point(best_of(k), BETA)(SPACE, reference)
    torch.testing.assert_close(logits.softmax(0).detach(), expected, atol=1e-4, rtol=0)
