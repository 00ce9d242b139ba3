"""The minimum arithmetic and memory traffic of a step, and the seconds they take on given hardware.

A product of [n, k] and [k, m] is 2nkm operations; a backward pass takes twice its forward pass. The matrix products of
the layers, of attention and of the output head are counted; a prompt is computed once, however many completions it has,
and tokens whose output is not used are not computed. Norms, softmaxes, the optimizer and recomputation that saves
memory are left out, so the seconds are a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama or Qwen2 layout with tied embeddings."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    qwen: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of the seven matrices of a layer."""
        attention = 2 * self.width * self.heads * self.head_dim + 2 * self.width * self.kv_heads * self.head_dim
        return attention + 3 * self.width * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.width * self.vocabulary


SHAPES = {
    "tiny": Shape(
        layers=8, width=256, intermediate=688, heads=8, kv_heads=8, head_dim=32, vocabulary=4096, context=2048
    ),
    "0.5b": Shape(
        layers=24,
        width=896,
        intermediate=4864,
        heads=14,
        kv_heads=2,
        head_dim=64,
        vocabulary=151936,
        context=32768,
        qwen=True,
    ),
    "1.5b": Shape(
        layers=28,
        width=1536,
        intermediate=8960,
        heads=12,
        kv_heads=2,
        head_dim=128,
        vocabulary=151936,
        context=32768,
        qwen=True,
    ),
}
"""A small Llama, and the two smallest of Qwen2.5."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The minimum work of a step."""

    operations: float
    """Operations in passes over many tokens at once, bounded by the matrix rate."""
    decode_operations: float = 0.0
    decode_bytes: float = 0.0
    """Work token by token, bounded by the matrix rate or the memory bandwidth, whichever is slower."""

    def __add__(self, other: Work) -> Work:
        return Work(
            operations=self.operations + other.operations,
            decode_operations=self.decode_operations + other.decode_operations,
            decode_bytes=self.decode_bytes + other.decode_bytes,
        )

    def seconds(self, *, matrix_rate: float, bandwidth: float) -> float:
        """Seconds at ``matrix_rate`` operations and ``bandwidth`` bytes per second."""
        decode = max(self.decode_operations / matrix_rate, self.decode_bytes / bandwidth)
        return self.operations / matrix_rate + decode


def forward(shape: Shape, *, tokens: int, attended: int, heads: int) -> float:
    """Operations of a forward pass over ``tokens``, whose queries see ``attended`` keys in all, with ``heads`` rows of
    logits."""
    layers = 2 * shape.layer_parameters * tokens + 4 * shape.heads * shape.head_dim * attended
    return float(shape.layers * layers + 2 * shape.head_parameters * heads)


def causal(begin: int, end: int) -> int:
    """Keys that the queries at positions ``begin`` to ``end - 1`` see, themselves included."""
    return end * (end + 1) // 2 - begin * (begin + 1) // 2


def sequences_forward(shape: Shape, prompts: Sequence[int], tails: Sequence[Sequence[int]], *, heads: int) -> float:
    """A forward pass over prompts of these lengths, each once, and over each one's tails of these lengths."""
    tokens = sum(prompts) + sum(map(sum, tails))
    attended = sum(causal(0, p) + sum(causal(p, p + t) for t in ts) for p, ts in zip(prompts, tails, strict=True))
    return forward(shape, tokens=tokens, attended=attended, heads=heads)


def rollout(shape: Shape, prompts: Sequence[int], *, group_size: int, new_tokens: int, bytes_per_number: int) -> Work:
    """Prefill each prompt once, then decode ``new_tokens`` for each completion; the first comes from the prefill.

    A decoding step reads the weights once, the keys and values of each prompt once, and each row's own.
    """
    rows, steps = len(prompts) * group_size, new_tokens - 1
    prefill = sequences_forward(shape, prompts, [[]] * len(prompts), heads=len(prompts))
    attended = group_size * sum(causal(p, p + steps) for p in prompts)
    decode = forward(shape, tokens=rows * steps, attended=attended, heads=rows * steps)
    weights = shape.layers * shape.layer_parameters + shape.head_parameters
    per_position = 2 * shape.layers * shape.kv_heads * shape.head_dim
    positions = steps * sum(prompts) + rows * steps * (steps + 1) // 2
    moved = bytes_per_number * (steps * weights + per_position * positions)
    return Work(operations=prefill, decode_operations=decode, decode_bytes=float(moved))


def logprobs(shape: Shape, prompts: Sequence[int], *, group_size: int, new_tokens: int) -> float:
    """Forward pass for the log-probs of all completions; the output at the last token is not used."""
    tails = [[new_tokens - 1] * group_size] * len(prompts)
    return sequences_forward(shape, prompts, tails, heads=len(prompts) * group_size * new_tokens)


def values(shape: Shape, prompts: Sequence[int], *, group_size: int, tail: int) -> float:
    """Forward pass of a value or reward model, whose head is one row, over prompts and ``tail`` tokens after each."""
    return sequences_forward(shape, prompts, [[tail] * group_size] * len(prompts), heads=0)


def grpo_step(shape: Shape, prompts: Sequence[int], *, group_size: int, new_tokens: int, bytes_per_number: int) -> Work:
    """Rollout; log-probs under the reference; forward and backward of the policy. Old log-probs are the sampler's."""
    sampled = rollout(shape, prompts, group_size=group_size, new_tokens=new_tokens, bytes_per_number=bytes_per_number)
    return sampled + Work(operations=4 * logprobs(shape, prompts, group_size=group_size, new_tokens=new_tokens))


def ppo_step(shape: Shape, prompts: Sequence[int], *, new_tokens: int, bytes_per_number: int) -> Work:
    """Rollout; reward model over completion and EOS; reference; values, which the advantages need before the update's
    backward pass; forward and backward of policy and value model, whose forward pass the values already are."""
    sampled = rollout(shape, prompts, group_size=1, new_tokens=new_tokens, bytes_per_number=bytes_per_number)
    policy = 4 * logprobs(shape, prompts, group_size=1, new_tokens=new_tokens)
    value = 3 * values(shape, prompts, group_size=1, tail=new_tokens - 1)
    reward = values(shape, prompts, group_size=1, tail=new_tokens + 1)
    return sampled + Work(operations=policy + value + reward)


def reward_epoch(shape: Shape, prompts: Sequence[int], sides: Sequence[tuple[int, int]]) -> Work:
    """Forward and backward over pairs: the tokens that both sides begin with once, then each side's own."""
    return Work(operations=3 * sequences_forward(shape, prompts, sides, heads=0))
