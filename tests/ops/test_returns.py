"""Discounted returns and GAE."""

import pytest
import torch

from tether.ops.returns import discounted_returns, gae

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_returns_worked_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0]])
    assert discounted_returns(rewards, MASK, gamma=0.5).tolist() == [[3.0, 4.0, 4.0], [5.5, 5.0, 0.0]]


def test_gae_worked_by_hand():
    """gamma 0.5, lam 0.5. Row 0: deltas 1 + .5*2 - 1 = 1, 0 + .5*4 - 2 = 0, 3 - 4 = -1; A = -1, -.25, 1 - .0625.
    Row 1 ends after two tokens: deltas 0 + .5*1 - 2 = -1.5, 2 - 1 = 1; A = 1, -1.25."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 99.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 99.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.9375, -0.25, -1.0], [-1.25, 1.0, 0.0]]
    assert returns.tolist() == [[1.9375, 1.75, 3.0], [0.75, 2.0, 0.0]]


def random_case():
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([9, 1, 4, 7, 2, 9])
    return rewards, values, torch.arange(9) < lengths.unsqueeze(1), lengths


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.3), (0.0, 0.5)])
def test_gae_is_the_weighted_sum_of_n_step_advantages(gamma, lam):
    """The definition, by a loop: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    rewards, values, mask, lengths = random_case()
    found, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, n in enumerate(lengths.tolist()):
        v = [*values[b, :n].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert found[b, t].item() == pytest.approx(expected)
            assert returns[b, t].item() == pytest.approx(expected + v[t])


def test_lam_one_gives_returns_less_values_and_lam_zero_one_step():
    rewards, values, mask, _ = random_case()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns, discounted_returns(rewards, mask, gamma=0.9))
    torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0.0))
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.where(mask[:, 1:], values[:, 1:], 0.0)
    following = torch.cat([following, torch.zeros(6, 1)], 1)
    torch.testing.assert_close(one_step, torch.where(mask, rewards + 0.9 * following - values, 0.0))


def test_a_score_at_the_end_reaches_the_first_token_undiminished_when_gamma_and_lam_are_one():
    rewards = torch.zeros(1, 5)
    rewards[0, 4] = 2.0
    advantages, _ = gae(rewards, torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[2.0] * 5]


def test_what_stands_in_the_padding_does_not_matter():
    rewards, values, mask, _ = random_case()
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    dirty = gae(torch.where(mask, rewards, nan), torch.where(mask, values, nan), mask, gamma=0.9, lam=0.7)
    torch.testing.assert_close(dirty, clean)


def test_environment_tokens_are_carried_over_by_hand():
    """gamma 0.5, lam 0.5, the middle token is the environment's: two steps as if they were next to each other.
    Deltas 1 + .5*4 - 1 = 2 and 3 - 4 = -1; A = -1, 2 - .25."""
    mask = torch.tensor([[True, False, True]])
    rewards, values = torch.tensor([[1.0, 77.0, 3.0]]), torch.tensor([[1.0, 88.0, 4.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.75, 0.0, -1.0]]
    assert returns.tolist() == [[2.75, 0.0, 3.0]]
    assert discounted_returns(rewards, mask, gamma=0.5).tolist() == [[2.5, 0.0, 3.0]]


def test_environment_tokens_anywhere_change_nothing_for_the_emitted_ones():
    """Spread each row's tokens over a longer one at random places; in between is what must not be read."""
    rewards, values, mask, lengths = random_case()
    expected, expected_returns = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    generator = torch.Generator().manual_seed(2)
    for b, n in enumerate(lengths.tolist()):
        at = torch.randperm(20, generator=generator)[:n].sort().values
        wide = {"rewards": rewards, "values": values}
        spread = {name: torch.full((1, 20), float("nan"), dtype=torch.float64) for name in wide}
        for name, x in wide.items():
            spread[name][0, at] = x[b, :n]
        emitted = torch.zeros(1, 20, dtype=torch.bool)
        emitted[0, at] = True
        found, returns = gae(**spread, mask=emitted, gamma=0.9, lam=0.7)
        assert torch.equal(found[0, at], expected[b, :n])
        assert torch.equal(returns[0, at], expected_returns[b, :n])
        assert (found[~emitted] == 0).all()
        discounted = discounted_returns(spread["rewards"], emitted, gamma=0.9)
        assert torch.equal(discounted[0, at], discounted_returns(rewards, mask, gamma=0.9)[b, :n])
