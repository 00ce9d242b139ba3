"""Log-probabilities of tokens, and the entropy of the distributions they came from.

Both are of the *tempered* distribution softmax(logits / temperature), from which tokens are sampled. Everything is
computed in float32, whatever the dtype of the logits (in float64 if the logits are).

From logits, :func:`token_logprobs` and :func:`token_entropy`. From hidden states, :func:`chunked_logprobs`, which
does not hold all logits at once if there are many: for a vocabulary of 150,000 they are the largest tensor of a
training pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGIT_BYTES = 128 * 2**20
"""Up to this many bytes of float32 logits are kept from the forward pass to the backward pass; if there are more, only
one chunk of rows, of at most this many bytes, exists at a time."""
CHUNKS = 64
"""Number of chunks for logits that are not kept,"""
ROWS, LARGEST_SHARE = 128, 24
"""unless a chunk then has fewer rows than this: there are fewer chunks, of a 24th of all rows at most. A product of
few rows is slow, and each chunk adds a gradient of the size of the output head's weights."""
CACHE_BYTES, LAUNCH_BYTES = 2**20, 2**25
"""Approximate sizes of the blocks in which a chunk's softmax is computed: on a CPU one that stays in the cache,
elsewhere one that is worth a kernel launch."""
IMPOSSIBLE = -1e4
"""Log-probs below this belong to a probability of 0, in float64 too. -inf is raised to it, as 0 * -inf is NaN."""


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids].

    Shapes: ``logits`` [..., V], ``ids`` [...] int64; the result is [...], float32.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), in nats. ``logits`` [..., V]; the result is [...]."""
    logp = (logits.float() / temperature).log_softmax(-1).clamp(min=IMPOSSIBLE)
    return -(logp.exp() * logp).sum(-1)


def chunked_logprobs(
    hidden: Tensor,
    ids: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[Tensor, ...]:
    """``(logp,)`` directly from hidden states, or ``(logp, entropy)`` with ``entropy``, in little memory.

    Equal to ``token_logprobs(project(hidden), ids)`` and ``token_entropy(project(hidden))``. Logits of at most
    ``logit_bytes`` are kept for the backward pass; if there are more, each chunk's are recomputed there, and gradients
    must come from ``backward()``, not from ``torch.autograd.grad``. An entropy that is not differentiated costs nothing
    in the backward pass.

    Shapes: ``hidden`` [N, D], ``ids`` [N] int64; the results are [N], float32. ``project`` maps [n, D] to [n, V] row by
    row, for any n from 0, and is differentiable, such as a product and a soft cap.
    """

    def one(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], TokenSoftmax.apply(project(rows), targets, temperature, entropy))

    with torch.no_grad():
        row_bytes = 4 * project(hidden[:0]).size(-1)
    size = chunk_rows(hidden.size(0), row_bytes, logit_bytes=logit_bytes)
    if size == hidden.size(0):
        return one(hidden, ids)
    parts = [
        # reentrant where possible: each chunk's gradient is then added to the weights' gradient at once, instead of
        # accumulating in a separate tensor of the weights' size
        checkpoint(one, rows, targets, use_reentrant=hidden.requires_grad, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else one(rows, targets)
        for rows, targets in zip(hidden.split(size), ids.split(size), strict=True)
    ]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def chunk_rows(count: int, row_bytes: int, *, logit_bytes: int = LOGIT_BYTES) -> int:
    """Rows whose logits, of ``row_bytes`` in float32 each, exist at the same time: all, if they are kept."""
    if count * row_bytes <= logit_bytes:
        return count
    size = max(count // CHUNKS, min(ROWS, count // LARGEST_SHARE))
    return max(1, min(size, logit_bytes // row_bytes))


class TokenSoftmax(torch.autograd.Function):
    """``(log p[ids], H)``, or without ``entropy`` ``(log p[ids],)``, with p = softmax(logits / T) and H its entropy.

    It saves only the logits, and allocates one tensor of their size in the backward pass:

        d logits = ((onehot(ids) - p) g_logp - p (log p + H) g_H) / T

    Shapes: ``logits`` [n, V], ``ids`` [n] int64; both results are [n].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp, *entropies = (torch.empty(ids.shape, dtype=dtype, device=logits.device) for _ in range(1 + entropy))
        for rows in _blocks(logits):
            every = (logits[rows].to(dtype) / temperature).log_softmax(-1)
            logp[rows] = every.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
            if entropy:
                every = every.clamp(min=IMPOSSIBLE)
                entropies[0][rows] = -(every.exp() * every).sum(-1)
        ctx.save_for_backward(logits, ids)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, *entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        logits, ids = ctx.saved_tensors
        if g_logp is None:
            if g_entropy is None:
                return None, None, None, None
            g_logp = torch.zeros_like(g_entropy)
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            scaled = logits[rows].to(g_logp.dtype) / ctx.temperature
            p = scaled.softmax(-1)
            chosen = g_logp[rows].unsqueeze(-1) / ctx.temperature
            slope = chosen
            if g_entropy is not None:
                every = scaled.log_softmax(-1).clamp(min=IMPOSSIBLE)
                surprise = every - (p * every).sum(-1, keepdim=True)
                slope = chosen + surprise.mul_(g_entropy[rows].unsqueeze(-1) / ctx.temperature)
            gradient[rows] = p.mul_(-slope).scatter_add_(-1, ids[rows].unsqueeze(-1), chosen)
        return gradient, None, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, of at least one row each."""
    size = LAUNCH_BYTES if logits.device.type == "cuda" else CACHE_BYTES
    rows = max(1, size // max(1, 4 * logits.size(1)))
    return (slice(start, start + rows) for start in range(0, logits.size(0), rows))
