"""Attention over keys in two parts: a prefix that many rows share, and each row's own keys after it.

A softmax over a row of scores can be computed in parts. With lse_i = log sum_j exp(s_ij) of part i and o_i its output,

    lse = log(exp(lse_1) + exp(lse_2)),    o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2,

so the queries of all G completions multiply their prompt's keys in one product, without copies of the keys (the same
identity as in FlashAttention, Dao et al. 2022, arXiv 2205.14135, and in cascade attention).

The parts run in torch's fused kernels, which never hold a [queries, keys] matrix of scores: the flash kernel on a CPU,
the memory-efficient one on CUDA. Those kernels do not support a soft cap; it is computed by :func:`plain_attention`,
which is also the oracle for the fused ones.

Shapes: queries [B, H, Q, d], keys and values [B, H_kv, S, d] with H a multiple of H_kv; a bias is added to the scores,
is 0 or -inf, and broadcasts to [B, 1, Q, S]; ``lse`` is [B, H, Q], float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten: Any = torch.ops.aten

ON_HOST = ("cpu", "meta")
"""Devices on which a CPU's kernels run, or would: tensors without memory (meta) have the shapes of the CPU's."""
FEW = 4
"""Minimum number of queries for a CPU's kernel; fewer are repeated. In products of at least 4 rows the rounding of a
row does not depend on the other rows; in smaller ones it does (measured)."""


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(softmax(s) v, log sum exp s)`` with s = cap * tanh(scale * q k' / cap) + bias, in plain differentiable
    operations. A query that sees no key gets zeros and an lse of -inf."""
    heads = k.size(1)
    grouped = q.unflatten(1, (heads, q.size(1) // heads)).float()  # [B, H_kv, H / H_kv, Q, d]
    scores = torch.matmul(grouped, k.float().unsqueeze(2).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.unsqueeze(1).float()
    if causal:
        hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    lse = scores.masked_fill(blind, 0.0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()
    out = torch.matmul(weights, v.float().unsqueeze(2)).flatten(1, 2).to(q.dtype)
    return out, lse.masked_fill(blind, -torch.inf).squeeze(-1).flatten(1, 2)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """What :func:`plain_attention` gives without a soft cap, by torch's fused kernel; not differentiable by itself."""
    shape = q.shape
    if not causal:
        q, bias = _fold(q, k), _fold_bias(bias, q, k)
    if q.device.type in ON_HOST:
        rows = q.size(2)
        if rows < FEW:
            q = q.repeat(1, 1, -(-FEW // rows), 1)
            bias = bias if bias is None or bias.size(2) == 1 else bias.repeat(1, 1, -(-FEW // rows), 1)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_like(bias, q), scale=scale
        )
        out, lse = out[:, :, :rows], lse[:, :, :rows]
    else:
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(
            q, _repeat(k, q), _repeat(v, q), _aligned(bias, q, k), True, 0.0, causal, scale=scale
        )
        lse = lse.narrow(2, 0, q.size(2))
    if bias is not None and bias.size(2) > 1:  # the kernels disagree on the lse of a query that sees no key
        blind = bias.narrow(2, 0, out.size(2)).amax(-1) == -torch.inf
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
    return out.reshape(shape), lse.reshape(shape[:3])


def fused_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through *these* keys, where ``out`` and ``lse`` are of the softmax over all keys.

    With p_j = exp(s_j - lse) the gradient of a score is p_j (grad . v_j - grad . out): of the other keys it needs only
    ``out`` and ``lse``. The fused kernels compute exactly this, so parts need no kernel of their own.
    """
    shape = q.shape
    if not causal:
        bias = _fold_bias(bias, q, k)
        grad, out, lse = _fold(grad, k), _fold(out, k), _fold(lse, k)
        q = _fold(q, k)
    if q.device.type in ON_HOST:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_like(bias, q), scale=scale
        )
        return dq.reshape(shape), dk, dv
    padded = F.pad(lse, (0, -lse.size(2) % 32), value=torch.inf)  # as that kernel's forward pass leaves it
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # for dropout, which is off
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad,
        q,
        _repeat(k, q),
        _repeat(v, q),
        _aligned(bias, q, k),
        out,
        padded,
        seed,
        seed,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    heads = k.size(1)
    return dq.reshape(shape), dk.unflatten(1, (heads, -1)).sum(2), dv.unflatten(1, (heads, -1)).sum(2)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over the keys of both parts, from the ``(out, lse)`` of each; out is [..., d] and lse [...]."""
    (out_1, lse_1), (out_2, lse_2) = first, second
    # a softmax of two, not a sigmoid: it computes row by row, while a sigmoid of many rounds the last few differently
    share = torch.stack([lse_1, lse_2], -1).softmax(-1)[..., :1].to(out_1.dtype)
    return out_2 + share * (out_1 - out_2), torch.logaddexp(lse_1, lse_2)


class _SharedPrefix(torch.autograd.Function):
    """Forward and backward of :func:`shared_prefix_attention` in the fused kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_bias: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        groups, members, width = q.shape[:3]
        to_prefix = fused_attention(
            _by_group(q), prefix_k.transpose(1, 2), prefix_v.transpose(1, 2), bias=prefix_bias, scale=scale
        )
        to_own = fused_attention(_by_row(q), _by_row(k), _by_row(v), bias=bias, causal=bias is None, scale=scale)
        out, lse = merge(
            (to_prefix[0].transpose(1, 2).unflatten(1, (members, width)), _lse_of_groups(to_prefix[1], members)),
            (to_own[0].transpose(1, 2).unflatten(0, (groups, members)), _lse_of_rows(to_own[1], groups)),
        )
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, prefix_bias, bias, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, prefix_bias, bias, out, lse = ctx.saved_tensors
        grad, out = grad.contiguous(), out.contiguous()
        of_groups = lse.permute(0, 3, 1, 2).flatten(2)
        of_rows = lse.permute(0, 1, 3, 2).flatten(0, 1)
        dq, dk_prefix, dv_prefix = fused_attention_backward(
            _by_group(grad),
            _by_group(q),
            prefix_k.transpose(1, 2),
            prefix_v.transpose(1, 2),
            _by_group(out),
            of_groups.contiguous(),
            bias=prefix_bias,
            scale=ctx.scale,
        )
        dq_own, dk, dv = fused_attention_backward(
            _by_row(grad),
            _by_row(q),
            _by_row(k),
            _by_row(v),
            _by_row(out),
            of_rows.contiguous(),
            bias=bias,
            causal=bias is None,
            scale=ctx.scale,
        )
        shape = q.shape[:2]
        dq = dq.transpose(1, 2).reshape(q.shape) + dq_own.transpose(1, 2).reshape(q.shape)
        own = (g.transpose(1, 2).unflatten(0, shape) for g in (dk, dv))
        return dq, *own, dk_prefix.transpose(1, 2), dv_prefix.transpose(1, 2), None, None, None


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_bias: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the G rows of a group over all of the group's prefix, and causally over their own keys.

    Differentiable in q, k, v and the prefix, whose gradient is summed over the group by the kernel: neither the prefix
    nor a matrix of scores is stored G times.

    Shapes, with tokens before heads: ``q`` and the result [P, G, T, H, d]; ``k``, ``v`` [P, G, T, H_kv, d];
    ``prefix_k``, ``prefix_v`` [P, L, H_kv, d]; ``prefix_bias`` [P, 1, 1 or G * T, L], -inf where a prefix has no token;
    ``bias`` [P * G, 1, T, T] replaces the causal mask where a window narrows it.
    """
    if softcap is None:
        out: Tensor = _SharedPrefix.apply(q, k, v, prefix_k, prefix_v, prefix_bias, bias, scale)
        return out
    groups, members, width = q.shape[:3]
    to_prefix = plain_attention(
        _by_group(q), prefix_k.transpose(1, 2), prefix_v.transpose(1, 2), bias=prefix_bias, scale=scale, softcap=softcap
    )
    to_own = plain_attention(
        _by_row(q), _by_row(k), _by_row(v), bias=bias, causal=bias is None, scale=scale, softcap=softcap
    )
    return merge(
        (to_prefix[0].transpose(1, 2).unflatten(1, (members, width)), _lse_of_groups(to_prefix[1], members)),
        (to_own[0].transpose(1, 2).unflatten(0, (groups, members)), _lse_of_rows(to_own[1], groups)),
    )[0]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention of each row over its own keys. Differentiable.

    Shapes: ``q`` and the result [B, S, H, d]; ``k``, ``v`` [B, S, H_kv, d]; ``bias`` [B or 1, 1, S, S] replaces the
    causal mask.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap is not None:
        out = plain_attention(q, k, v, bias=bias, causal=bias is None, scale=scale, softcap=softcap)[0]
    else:
        grouped = q.device.type in ON_HOST or (bias is None and q.dtype != torch.float32)
        if not grouped:  # no fused kernel takes fewer key heads here
            k, v = _repeat(k, q), _repeat(v, q)
        if q.device.type == "meta":  # where torch would choose plain products
            out, _ = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, bias is None, attn_mask=_like(bias, q), scale=scale
            )
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=_like(bias, q), is_causal=bias is None, scale=scale, enable_gqa=grouped
            )
    return out.transpose(1, 2)


def window_bias(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """0 where a query sees the key, -inf where the key is ahead of it or ``window`` or more positions back.

    Shapes: ``query_positions`` [..., Q], ``key_positions`` [..., S]; the result is [..., Q, S], float32.
    """
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """Fold the query heads that share a key head into more queries, [B, H, Q, ...] -> [B, H_kv, H / H_kv * Q, ...], so
    that keys need no copies. Not for causal attention, where a query's row decides what it sees."""
    return x if x.size(1) == k.size(1) else x.reshape(x.size(0), k.size(1), -1, *x.shape[3:])


def _fold_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return bias if bias is None or bias.size(2) == 1 else bias.repeat(1, 1, q.size(1) // k.size(1), 1)


def _by_group(x: Tensor) -> Tensor:
    """[P, G, T, H, d] -> [P, H, G * T, d]."""
    return x.flatten(1, 2).transpose(1, 2)


def _by_row(x: Tensor) -> Tensor:
    """[P, G, T, H, d] -> [P * G, H, T, d]."""
    return x.flatten(0, 1).transpose(1, 2)


def _lse_of_groups(lse: Tensor, members: int) -> Tensor:
    """[P, H, G * T] -> [P, G, T, H]."""
    return lse.reshape(*lse.shape[:2], members, -1).permute(0, 2, 3, 1)


def _lse_of_rows(lse: Tensor, groups: int) -> Tensor:
    """[P * G, H, T] -> [P, G, T, H]."""
    return lse.reshape(groups, -1, *lse.shape[1:]).transpose(2, 3)


def _like(bias: Tensor | None, q: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(q.dtype)


def _repeat(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values for each query head, [B, H, S, d]."""
    return k.repeat_interleave(q.size(1) // k.size(1), 1) if k.size(1) != q.size(1) else k


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias for every query and head, [B, H, Q, S], its rows on 16-element boundaries as the kernel requires."""
    if bias is None:
        return None
    wide = F.pad(bias.to(q.dtype), (0, -bias.size(-1) % 16)).narrow(-1, 0, bias.size(-1))
    return wide.expand(q.size(0), q.size(1), q.size(2), k.size(2))
