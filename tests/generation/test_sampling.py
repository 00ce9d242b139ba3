"""The distribution that tokens are drawn from, by hand, and the draw that one number decides."""

from __future__ import annotations

import torch

from tether.generation.sampling import draw, log_distribution
from tether.types import Sampling


def test_sampled_frequencies_match_the_distribution():
    """Draws at evenly spread quantiles hit each token in proportion to its probability."""
    logits = torch.randn(1, 6)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = draw(logits.log_softmax(-1).expand(10_000, 6), u, greedy=False)
    frequencies = torch.bincount(tokens, minlength=6) / 10_000
    torch.testing.assert_close(frequencies, logits.softmax(-1)[0], atol=2e-4, rtol=0)


def test_truncation_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(**options):
        logp = log_distribution(logits, Sampling(**options), step=torch.tensor([0]), ends=torch.tensor([0]))
        torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0))
        return [i for i in range(4) if logp[0, i] > -torch.inf]

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k_tokens=2) == [0, 1]
    assert kept(top_p=0.7) == [0, 1]  # the token that passes 0.7 is the last one in
    assert kept(top_p=0.76) == [0, 1, 2]
    assert kept(min_p=0.25) == [0, 1, 2]  # 0.25 * 0.5 = 0.125
    assert kept(min_new_tokens=1) == [1, 2, 3]
    assert kept(top_k_tokens=3, top_p=0.6, temperature=1e9) == [0, 1]  # tempered to uniform first: 2 of 3 thirds
    free = log_distribution(
        logits, Sampling(min_new_tokens=1), step=torch.tensor([0]), ends=torch.tensor([], dtype=torch.int64)
    )  # a model that knows no end
    torch.testing.assert_close(free.exp(), logits.exp())
    halved = log_distribution(logits, Sampling(temperature=0.5), step=torch.tensor([0]), ends=torch.tensor([0])).exp()
    squares = torch.tensor([[0.25, 0.0625, 0.0225, 0.01]])
    torch.testing.assert_close(halved, squares / squares.sum())


def test_a_token_of_probability_zero_is_never_drawn():
    logp = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    assert draw(logp, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), greedy=False).tolist() == [1, 1, 1]


def test_top_p_is_cut_where_float64_says():
    """200,000 equal tokens: their float32 sums are off by far more than the tokens weigh."""
    count = 200_000
    logp = log_distribution(torch.zeros(1, count), Sampling(top_p=0.75), step=torch.tensor([0]), ends=torch.tensor([0]))
    assert abs(int((logp > -torch.inf).sum()) - 0.75 * count) <= 1
