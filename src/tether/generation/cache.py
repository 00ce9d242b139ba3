"""The rollout engine's key-value cache: each prompt's keys once, and each completion's own.

A *slot* holds a prompt, a *row* a completion in flight. Both are dense in their pools: the last one moves to the place
of one that leaves. Attention of a decoding step is computed in two parts (:mod:`tether.ops.attention`): the queries of
all completions of a prompt on its keys in one product, and the query of each row on its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tether.models.attention import Layer
from tether.ops.attention import causal_attention, fused_attention, merge, plain_attention, window_bias

ALIGNED = 8
"""Rows and tokens are run in multiples of this, so that a row is rounded alike in every batch. Measured on a CPU: a
product of fewer than 12 rows, and not a multiple of 4, sums in another order, and the rest of an elementwise
exponential beyond a multiple of 32 numbers is computed by another routine."""


def aligned(count: int) -> int:
    """``count``, rounded up to a multiple of :data:`ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


def extent(length: int, device: torch.device) -> int:
    """The number of keys, at least ``length``, that attention is given where ``length`` are real.

    On a CPU the sum over keys runs in blocks of 512, and in another order for a block of 193 to 383 keys than for any
    other (measured; the keys behind ``length`` have weight 0 either way). Those lengths are avoided, so that a
    completion does not depend on the lengths of the others in its batch.
    """
    rest = length % 512
    if device.type == "cpu" and rest > 192:
        return length - rest + (384 if rest <= 384 else 512)
    return -(-length // 16) * 16


class Pool:
    """Keys and values of up to ``places`` sequences, [layers, 2, places, H_kv, capacity, d]."""

    def __init__(self, model: PreTrainedModel, places: int, capacity: int) -> None:
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, places, heads, capacity, width)
        self.places, self.capacity = places, capacity
        # zeros and not empty: what a masked key holds is multiplied by 0, and 0 * nan is nan
        self.data = torch.zeros(shape, dtype=model.dtype, device=model.device)

    @staticmethod
    def bytes_per_token(model: PreTrainedModel) -> int:
        """Bytes per token, in all layers."""
        return Pool(model, 1, 1).data.nbytes

    def of(self, layer: int, count: int, length: int, *, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``count`` sequences, [count, H_kv, length, d] each, which are views; or of those
        at ``places``."""
        if places is None:
            keys, values = self.data[layer, :, :count, :, :length]
        else:
            keys, values = self.data[layer, :, :, :, :length].index_select(1, places)
        return keys, values

    def move(self, targets: Tensor, sources: Tensor) -> None:
        """Copy the sequences at ``sources`` to the places ``targets``."""
        self.data[:, :, targets] = self.data[:, :, sources]


@dataclass(frozen=True)
class PrefillLayout:
    """Several prompts, one behind the other, into slots; a :class:`tether.models.attention.Layout`.

    The attention of each prompt is computed by itself, in its own shape, so that its keys do not depend on the prompts
    that are prefilled with it. Tokens behind the last prompt are for alignment only.
    """

    prefixes: Pool
    spans: Sequence[tuple[int, int, int]]
    """(slot, first token, length)."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_zeros(1, q.size(2), q.size(1), q.size(3))
        for slot, start, length in self.spans:
            span = slice(start, start + length)
            self.prefixes.data[layer.index, 0, slot, :, :length] = k[0, :, span]
            self.prefixes.data[layer.index, 1, slot, :, :length] = v[0, :, span]
            bias = None
            if layer.window is not None and layer.window < length:
                at = torch.arange(length, device=q.device)
                bias = window_bias(at, at, layer.window)[None, None]
            out[:, span] = causal_attention(
                *(x[:, :, span].transpose(1, 2) for x in (q, k, v)), bias=bias, scale=layer.scale, softcap=layer.softcap
            )
        return out


class Shape(NamedTuple):
    """All sizes in a decoding step that can change from step to step."""

    rows: int
    slots: int
    members: int
    """Places per slot on the grid: the most completions that one prompt has in flight, or more."""
    prefix_reach: int
    """Keys of a slot that attention is given."""
    own_reach: int
    """Keys of a row that attention is given."""


@dataclass(frozen=True)
class Seating:
    """Which rows belong to which slot: rows [0, n) on a grid [slots, members], whose empty places point at row 0."""

    shape: Shape
    grid: Tensor  # [slots * members] int64: the row at each place
    seats: Tensor  # [n] int64: the place of each row
    prefix_lengths: Tensor  # [slots] int64

    @staticmethod
    def of(members: Sequence[Sequence[int]], lengths: Sequence[int], shape: Shape, device: torch.device) -> Seating:
        """The rows ``members`` of each slot, whose prompt has ``lengths`` tokens; ``shape`` may be larger than that."""
        grid = torch.zeros(shape.slots, shape.members, dtype=torch.int64)
        seats = torch.zeros(shape.rows, dtype=torch.int64)
        for slot, rows in enumerate(members):
            for k, row in enumerate(rows):
                grid[slot, k] = row
                seats[row] = slot * shape.members + k
        return Seating(
            shape=shape,
            grid=grid.flatten().to(device),
            seats=seats.to(device),
            prefix_lengths=torch.tensor([*lengths, *[1] * (shape.slots - len(lengths))], device=device),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.grid, self.seats, self.prefix_lengths


class DecodeLayout:
    """New tokens of rows, as many of each: a :class:`tether.models.attention.Layout`. The seating has all shapes.

    A decoding step has one new token per row. What an environment shows is several, of some of the rows: these are at
    ``places`` of the pool, and the seating counts them from 0.
    """

    def __init__(
        self,
        prefixes: Pool,
        own: Pool,
        seating: Seating,
        positions: Tensor,
        counts: Tensor,
        *,
        new: int = 1,
        places: Tensor | None = None,
    ) -> None:
        """``positions`` [n]: of the last new token in its text; ``counts`` [n]: tokens per row, the ``new`` ones
        included; ``places`` [n]: None for the first n."""
        self.prefixes, self.own, self.seating, self.new, self.places = prefixes, own, seating, new, places
        self.shape = seating.shape
        back = torch.arange(1 - new, 1, device=counts.device)
        self.positions, self.counts = positions.unsqueeze(1) + back, counts.unsqueeze(1) + back  # [n, new]
        self.rows = torch.arange(self.shape.rows, device=counts.device) if places is None else places
        self.biases: dict[int | None, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seating, shape, n = self.seating, self.shape, self.shape.rows
        at = (self.rows.unsqueeze(1), slice(None), self.counts - 1)
        self.own.data[layer.index, 0][at] = k[:n].transpose(1, 2)
        self.own.data[layer.index, 1][at] = v[:n].transpose(1, 2)
        prefix_bias, own_bias = self._biases(layer.window)
        # on the grid, the new tokens of all rows of a slot are queries of one product
        seated = q[:n].index_select(0, seating.grid).unflatten(0, (shape.slots, shape.members)).transpose(1, 2)
        prefix = self.prefixes.of(layer.index, shape.slots, shape.prefix_reach)
        to_prefix = self._attention(layer, seated.flatten(2, 3), prefix, prefix_bias)
        own = self.own.of(layer.index, n, shape.own_reach, places=self.places)
        to_own = self._attention(layer, q[:n], own, own_bias)
        out, _ = merge((self._unseated(to_prefix[0]), self._unseated(to_prefix[1])), to_own)
        out = out.transpose(1, 2)
        return F.pad(out, (0, 0, 0, 0, 0, 0, 0, q.size(0) - n)) if n < q.size(0) else out

    def _unseated(self, x: Tensor) -> Tensor:
        """From the grid, [slots, H, members * new, ...], to the rows, [n, H, new, ...]."""
        on_grid = x.unflatten(2, (self.shape.members, self.new)).transpose(1, 2).flatten(0, 1)
        return on_grid.index_select(0, self.seating.seats)

    @staticmethod
    def _attention(layer: Layer, q: Tensor, cached: tuple[Tensor, Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
        k, v = cached
        if layer.softcap is not None:
            return plain_attention(q, k, v, bias=bias, scale=layer.scale, softcap=layer.softcap)
        return fused_attention(q, k, v, bias=bias, scale=layer.scale)

    def _biases(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Biases of rows on prefixes, [slots, 1, 1 or members * new, reach], and on their own keys, [n, 1, new,
        reach]."""
        if window not in self.biases:
            self.biases[window] = self._make_biases(window)
        return self.biases[window]

    def _make_biases(self, window: int | None) -> tuple[Tensor, Tensor]:
        seating, shape = self.seating, self.shape
        at = torch.arange(max(shape.prefix_reach, shape.own_reach), device=self.counts.device)
        in_prefix, in_own = at[: shape.prefix_reach], at[: shape.own_reach]
        prefix = _hide(in_prefix >= seating.prefix_lengths.unsqueeze(1))[:, None, None]
        first = self.positions[:, :1] - self.counts[:, :1] + 1  # of each row's own tokens
        own = _hide(in_own >= self.counts.unsqueeze(2)).unsqueeze(1)
        if window is not None:
            seated = self.positions.index_select(0, seating.grid).view(shape.slots, shape.members * self.new)
            keys = in_prefix.expand(shape.slots, shape.prefix_reach)
            prefix = prefix + window_bias(seated, keys, window).unsqueeze(1)
            own = own + window_bias(self.positions, first + in_own, window).unsqueeze(1)
        return prefix, own


def _hide(hidden: Tensor) -> Tensor:
    """-inf where True, 0 elsewhere."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
