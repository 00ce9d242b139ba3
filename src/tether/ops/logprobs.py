"""Log-probabilities of tokens, and the entropy of the distributions they came from.

Both are of the *tempered* distribution softmax(logits / temperature): the one that sampled. Everything is computed in
float32, whatever the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[ids].

    Shapes: ``logits`` [..., V], ``ids`` [...] int64; the result is [...], float32.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v with p = softmax(logits / temperature), in nats. ``logits`` [..., V]; the result is [...]."""
    logp = (logits.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def chunked_logprobs(
    hidden: Tensor,
    ids: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies straight from hidden states, never holding more than ``chunk`` rows of logits.

    Equal to ``token_logprobs(project(hidden), ids)`` and ``token_entropy(project(hidden))``; each chunk's logits are
    recomputed in the backward pass instead of kept.

    Shapes: ``hidden`` [N, D], ``ids`` [N] int64; both results are [N], float32. ``project`` maps [n, D] to [n, V].
    """

    def one(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scaled = project(rows).float() / temperature
        logp = scaled.log_softmax(-1)
        return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)

    if hidden.size(0) == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty
    parts = [
        checkpoint(one, rows, targets, use_reentrant=False) if torch.is_grad_enabled() else one(rows, targets)
        for rows, targets in zip(hidden.split(chunk), ids.split(chunk), strict=True)
    ]
    return torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])
