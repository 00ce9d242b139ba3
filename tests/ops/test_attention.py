"""Attention in parts against attention over everything, and the fused kernels against plain products."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tether.ops.attention import (
    causal_attention,
    fused_attention,
    fused_attention_backward,
    merge,
    plain_attention,
    shared_prefix_attention,
    window_bias,
)

P, G, T, L, D = 3, 2, 5, 7, 8
SCALE = 0.3
PREFIXES = torch.tensor([7, 4, 1])


def heads(request_heads):
    return {"all": (4, 4), "grouped": (4, 2), "one": (4, 1)}[request_heads]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)), requires_grad=True)


@pytest.fixture(params=["all", "grouped", "one"])
def tensors(request):
    """q, k, v, prefix_k, prefix_v."""
    query, keys = heads(request.param)
    return (
        draw(P, G, T, query, D),
        draw(P, G, T, keys, D),
        draw(P, G, T, keys, D) * 1.5,
        draw(P, L, keys, D) * 0.7,
        draw(P, L, keys, D),
    )


def row_by_row(q, k, v, prefix_k, prefix_v, *, window=None, softcap=None):
    """The oracle: every row with its own copy of its prefix, one query at a time."""
    out = torch.zeros_like(q)
    repeat = q.size(3) // k.size(3)
    for p in range(P):
        n = int(PREFIXES[p])
        for g in range(G):
            for t in range(T):
                keys = torch.cat([prefix_k[p, :n], k[p, g, : t + 1]]).repeat_interleave(repeat, 1)
                values = torch.cat([prefix_v[p, :n], v[p, g, : t + 1]]).repeat_interleave(repeat, 1)
                if window is not None:
                    keys, values = keys[-window:], values[-window:]
                scores = torch.einsum("hd,shd->hs", q[p, g, t], keys) * SCALE
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[p, g, t] = torch.einsum("hs,shd->hd", scores.softmax(-1), values)
    return out


def prefix_bias():
    return torch.where(torch.arange(L) < PREFIXES.unsqueeze(1), 0.0, -torch.inf)[:, None, None]


def same_with_gradients(found, expected, tensors):
    assert torch.allclose(found, expected, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_shared_prefix_is_as_good_as_a_copy_for_each_row(tensors, softcap):
    found = shared_prefix_attention(*tensors, prefix_bias=prefix_bias(), scale=SCALE, softcap=softcap)
    same_with_gradients(found, row_by_row(*tensors, softcap=softcap), tensors)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_window_over_prefix_and_row(tensors, softcap):
    window = 4
    positions = PREFIXES.view(P, 1, 1) + torch.arange(T).expand(P, G, T)
    to_prefix = window_bias(positions.flatten(1), torch.arange(L).expand(P, L), window).unsqueeze(1) + prefix_bias()
    some = (to_prefix > -torch.inf).any(-1, keepdim=True)
    assert not some.all()  # the last queries of the short prefix see none of it
    own = window_bias(torch.arange(T), torch.arange(T), window).expand(P * G, 1, T, T)
    found = shared_prefix_attention(*tensors, prefix_bias=to_prefix, bias=own, scale=SCALE, softcap=softcap)
    same_with_gradients(found, row_by_row(*tensors, window=window, softcap=softcap), tensors)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_gives_what_plain_products_give(tensors, causal):
    q, k, v = (x.detach().flatten(0, 1).transpose(1, 2) for x in tensors[:3])
    bias = None if causal else window_bias(torch.arange(T), torch.arange(T) + 2, None).expand(P * G, 1, T, T)
    for found, expected in zip(
        fused_attention(q, k, v, bias=bias, causal=causal, scale=SCALE),
        plain_attention(q, k, v, bias=bias, causal=causal, scale=SCALE),
        strict=True,
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_query_that_sees_nothing_adds_nothing(tensors):
    q, k, v = (x.detach().flatten(0, 1).transpose(1, 2) for x in tensors[:3])
    nothing = torch.full((P * G, 1, T, T), -torch.inf)
    for kind in (fused_attention, plain_attention):
        blind = kind(q, k, v, bias=nothing, scale=SCALE)
        assert (blind[1] == -torch.inf).all()
        seen = kind(q, k, v, causal=True, scale=SCALE)
        assert torch.equal(merge(blind, seen)[0], seen[0])
        assert torch.equal(merge(blind, seen)[1], seen[1])


def test_merging_by_hand():
    """Scores log 1 | log 3 with values 10 | 2: (1 * 10 + 3 * 2) / 4 = 4, and the weights add up to 4."""
    out, lse = merge(
        (torch.tensor([10.0]), torch.tensor(0.0)),
        (torch.tensor([2.0]), torch.tensor(3.0).log()),
    )
    assert out.item() == pytest.approx(4.0)
    assert lse.exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (3, 1.5)])
def test_causal_attention_looks_back_as_far_as_its_window(tensors, window, softcap):
    q, k, v = (x.flatten(0, 1) for x in tensors[:3])
    bias = window_bias(torch.arange(T), torch.arange(T), window)[None, None] if window else None
    found = causal_attention(q, k, v, bias=bias, scale=SCALE, softcap=softcap)
    repeat = q.size(2) // k.size(2)
    expected = torch.zeros_like(found)
    for t in range(T):
        first = max(0, t + 1 - window) if window else 0
        keys, values = (x[:, first : t + 1].repeat_interleave(repeat, 2) for x in (k, v))
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], keys) * SCALE
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        expected[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), values)
    same_with_gradients(found, expected, tensors[:3])


def test_window_bias_by_hand():
    seen = window_bias(torch.tensor([4, 5]), torch.tensor([2, 3, 4, 5]), 2) == 0
    assert seen.tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernels_take_what_they_are_given(dtype):
    """Shapes and signatures alone, on tensors that hold nothing: this runs without a GPU and computes no number."""
    with FakeTensorMode(), torch.no_grad():

        def empty(*shape):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        q, k, v = (
            empty(P, 10, 4, D).transpose(1, 2),
            empty(P, L, 2, D).transpose(1, 2),
            empty(P, L, 2, D).transpose(1, 2),
        )
        bias = torch.empty(P, 1, 1, L, device="cuda")
        for options in ({"bias": bias}, {"causal": True}):
            out, lse = fused_attention(q, k, v, scale=SCALE, **options)
            assert (out.shape, lse.shape, lse.dtype) == ((P, 4, 10, D), (P, 4, 10), torch.float32)
            grads = fused_attention_backward(empty(*q.shape), q, k, v, out, lse, scale=SCALE, **options)
            assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
        assert causal_attention(empty(P, T, 4, D), empty(P, T, 2, D), empty(P, T, 2, D), scale=SCALE).shape == (
            P,
            T,
            4,
            D,
        )
