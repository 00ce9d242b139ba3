"""DPO lands on the optimum that its loss implies, in closed form, on a space that can be enumerated.

Every two completions of the space are a pair, as often in each order as the preference between them says: the data are
the population, and the optimum is exact.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from enumerable import Space, tiny_llama, total_variation
from tether.algorithms import dpo
from tether.algorithms.optimise import Optim
from tether.types import PreferencePair

VOCAB, LENGTH, SEED = 4, 2, 1
PROMPT = (2, 3)
"""Of two tokens: without positions of its own, a Llama says after (0, 0) what it says after (0)."""
TOLERANCE = 0.03
STEPS, RATE = 80, 1e-3


@pytest.fixture(scope="module")
def space():
    """13 completions of one and two tokens."""
    return Space.of(VOCAB, LENGTH, seed=SEED)


@pytest.fixture(scope="module")
def ref_logp(space):
    with torch.no_grad():
        found = space.logprobs(tiny_llama(VOCAB, seed=SEED), prompt=PROMPT)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return found


def population(space, wins) -> list[PreferencePair]:
    """``wins(i, j)`` copies of completion i preferred to j, for all i and j."""
    return [
        PreferencePair(prompt_ids=PROMPT, chosen_ids=space.completions[i], rejected_ids=space.completions[j])
        for i, j in itertools.permutations(range(len(space.completions)), 2)
        for _ in range(wins(i, j))
    ]


def train(space, pairs, **options):
    """Train with the public functions alone, on all pairs at every step; gives log pi of every completion."""
    model = tiny_llama(VOCAB, seed=SEED)
    config = dpo.Config(
        epochs=STEPS,
        batch_size=len(pairs),
        optim=Optim(learning_rate=RATE, lr_schedule="cosine", adam_beta2=0.95),
        **options,
    )
    state = dpo.State.create(model, len(pairs), config, seed=0)
    for _ in dpo.steps(state, pairs, config=config):
        pass
    with torch.no_grad():
        return space.logprobs(model, prompt=PROMPT)


ODDS = [1 + (7 * i) % 4 for i in range(13)]
"""exp(reward) of each completion, a small whole number: i beats j ODDS[i] times for ODDS[j] times that it loses."""


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_on_bradley_terry_pairs_the_policy_is_the_optimum_of_the_reward_under_the_kl(space, ref_logp, beta):
    """pi_ref exp(r / beta) / Z, with r = log ODDS."""
    rewards = torch.tensor(ODDS, dtype=torch.float64).log()
    optimum = (ref_logp + rewards / beta).softmax(0)
    assert total_variation(optimum, ref_logp.exp()) > 4 * TOLERANCE
    found = train(space, population(space, lambda i, _: ODDS[i]), beta=beta)
    assert total_variation(found.exp(), optimum) < TOLERANCE


def test_ipo_lands_on_the_mean_preference(space, ref_logp):
    """pi_ref exp(p / beta) / Z, with p_i the mean over all j of the probability that i is preferred to j: any
    preferences will do, also those that no reward explains."""
    beta, copies, count = 0.5, 4, len(space.completions)
    draw = torch.Generator().manual_seed(0)
    table = torch.randint(0, copies + 1, (count, count), generator=draw)
    wins = table.triu(1) + (copies - table.T).tril(-1)
    preferred = (wins.double() / copies + torch.eye(count) / 2).mean(1)
    optimum = (ref_logp + preferred / beta).softmax(0)
    assert total_variation(optimum, ref_logp.exp()) > 2 * TOLERANCE
    found = train(space, population(space, lambda i, j: int(wins[i, j])), beta=beta, loss="ipo")
    assert total_variation(found.exp(), optimum) < TOLERANCE


def test_label_smoothing_bounds_the_margin_of_pairs_that_never_disagree(space, ref_logp):
    """A completion that is always preferred has no finite optimum. Smoothed, its implicit reward is higher by
    log((1 - e) / e)."""
    smoothing, beta = 0.1, 0.5
    found = train(space, population(space, lambda i, j: int(i == 3 and j == 5)), beta=beta, label_smoothing=smoothing)
    ratio = beta * (found - ref_logp)
    assert float(ratio[3] - ratio[5]) == pytest.approx(math.log((1 - smoothing) / smoothing), abs=0.02)


def test_a_margin_is_added_to_the_reward(space, ref_logp):
    """Of a pair that ties: the implicit reward of its chosen side is higher by its margin."""
    margin, beta = 0.7, 0.5
    both = [(3, 5, margin), (5, 3, -margin)]
    pairs = [
        PreferencePair(
            prompt_ids=PROMPT, chosen_ids=space.completions[i], rejected_ids=space.completions[j], margin=offset
        )
        for i, j, offset in both
    ]
    ratio = beta * (train(space, pairs, beta=beta) - ref_logp)
    assert float(ratio[3] - ratio[5]) == pytest.approx(margin, abs=0.02)
