"""From logits to a token: the tempered, truncated distribution, and a draw from it that one uniform number decides."""

from __future__ import annotations

import torch
from torch import Tensor

from tether.errors import GuardError
from tether.types import Sampling


def uniforms(seed: int, count: int) -> Tensor:
    """The numbers in [0, 1) that decide the tokens of the completion with this seed, [count] float64."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_distribution(logits: Tensor, sampling: Sampling, *, step: Tensor, ends: Tensor) -> Tensor:
    """Log-probabilities of the distribution that samples token ``step`` of each row; -inf where one cannot be drawn.

    Divided by the temperature first, then cut to top-k, top-p and min-p in this order, then renormalised. Temperature 0
    is taken as 1 here: the choice is the argmax, and its log-prob is the model's.
    Shapes: ``logits`` and the result [B, V], ``step`` [B] int64 from 0, ``ends`` [n] int64, the end-of-sequence ids.
    """
    scores = logits.float()
    if sampling.min_new_tokens > 0:
        early = torch.zeros_like(scores, dtype=torch.bool).index_fill(-1, ends, True)
        scores = scores.masked_fill(early & (step < sampling.min_new_tokens).unsqueeze(1), -torch.inf)
    if sampling.temperature not in (0, 1):
        scores = scores / sampling.temperature
    if 0 < sampling.top_k_tokens < scores.size(-1):
        kth = scores.topk(sampling.top_k_tokens).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(descending=True)
        p = ordered.double().softmax(-1)  # float32 sums of 150,000 terms would misplace the cut
        before = p.cumsum(-1) - p
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        scores = scores.masked_fill(cut, -torch.inf)
    if sampling.min_p > 0:
        logp = scores.log_softmax(-1)
        floor = logp.amax(-1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        scores = scores.masked_fill(logp < floor, -torch.inf)
    return scores.log_softmax(-1)


def diverged() -> GuardError:
    """The error for logits from which nothing can be drawn."""
    return GuardError("the logits are not finite", where="generation", hint="the policy's weights have diverged")


def draw(logp: Tensor, u: Tensor, *, greedy: bool) -> Tensor:
    """The token at quantile ``u`` of each row's distribution, in the order of ids; the likeliest when ``greedy``.

    One number in [0, 1) decides, so a completion depends on its own seed and not on the other rows of the batch. The
    sum is in float64: with 150,000 tokens, the error of a float32 sum exceeds the probability of rare tokens.
    Shapes: ``logp`` [B, V], ``u`` [B] float64; the result is [B] int64.
    """
    if greedy:
        return logp.argmax(-1)
    cumulative = logp.exp().double().cumsum(-1)
    target = (u * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logp.size(-1) - 1)
