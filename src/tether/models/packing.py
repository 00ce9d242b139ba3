"""Groups in one packed row: each prompt once, then each of its completions, which sees the prompt and itself.

The linear layers, nearly all of the arithmetic, then run once on every distinct token and on no padding. Only inside
attention are the tokens laid out on grids: the prompts' [P, L] and the completions' [P, G, T]. A prompt with a single
completion is one causal sequence with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.models.attention import Layer
from tether.ops.attention import causal_attention, shared_prefix_attention, window_bias
from tether.types import Batch


@dataclass(frozen=True)
class GroupLayout:
    """Where each token of a packed row stands, and what it sees: a :class:`tether.models.attention.Layout`.

    Trunks come first in the row, those with branches before those without, then the branches, group by group. Padded
    places of the grids point at token 0; what they compute is never read.
    """

    trunks: Tensor  # [P, L] int64, places in the packed row
    branches: Tensor  # [P', G, T] int64, of the first P' trunks; P' may be 0
    prefix_lengths: Tensor  # [P'] int64, the tokens of the first P' trunks
    longest_prefix: int
    places: Tensor  # [N] int64: where each token is in the flattened trunks, followed by the flattened branches
    biases: dict[int | None, tuple[Tensor | None, Tensor | None, Tensor | None]] = field(default_factory=dict)

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [N, H, d]
        q_trunk, k_trunk, v_trunk = (_on(x, self.trunks) for x in (q, k, v))
        trunk_bias, prefix_bias, branch_bias = self._biases(layer.window)
        out = causal_attention(
            q_trunk, k_trunk, v_trunk, bias=trunk_bias, scale=layer.scale, softcap=layer.softcap
        ).flatten(0, 1)
        groups, longest = self.branches.size(0), self.longest_prefix
        if groups:
            from_branches = shared_prefix_attention(
                _on(q, self.branches),
                _on(k, self.branches),
                _on(v, self.branches),
                k_trunk[:groups, :longest],
                v_trunk[:groups, :longest],
                prefix_bias=prefix_bias,
                bias=branch_bias,
                scale=layer.scale,
                softcap=layer.softcap,
            )
            out = torch.cat([out, from_branches.flatten(0, 2)])
        return out.index_select(0, self.places).unsqueeze(0)

    def _biases(self, window: int | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of trunks on themselves, of branches on prefixes and on themselves; None where plainly causal or all seen."""
        if window not in self.biases:
            self.biases[window] = self._make_biases(window)
        return self.biases[window]

    def _make_biases(self, window: int | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        groups, members, width = self.branches.shape
        at = torch.arange(max(self.trunks.size(1), width), device=self.trunks.device)

        def own(length: int) -> Tensor | None:
            if window is None or window >= length:
                return None
            return window_bias(at[:length], at[:length], window)[None, None]

        if groups == 0:
            return own(self.trunks.size(1)), None, None
        longest = self.longest_prefix
        keys = at[:longest].expand(groups, longest)
        real = keys < self.prefix_lengths.unsqueeze(1)
        prefix = torch.where(real, 0.0, -torch.inf)[:, None, None]
        if window is not None and window < longest + width:
            positions = self.prefix_lengths.unsqueeze(1) + at[:width].repeat(members)
            prefix = prefix + window_bias(positions, keys, window).unsqueeze(1)
        elif real.all():
            return own(self.trunks.size(1)), None, own(width)
        return own(self.trunks.size(1)), prefix, own(width)


def _on(x: Tensor, grid: Tensor) -> Tensor:
    """Rows of ``x`` [N, ...] on the places of a grid, [*grid, ...]."""
    return x.index_select(0, grid.flatten()).view(*grid.shape, *x.shape[1:])


@dataclass(frozen=True)
class Pack:
    """A batch as one row of distinct tokens."""

    ids: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64
    layout: GroupLayout
    states: Tensor  # [n] int64: the place of s_t for every completion token, row by row
    ends: Tensor  # [B] int64: the place of each row's last token, if that was packed


def pack(batch: Batch, *, ends: bool) -> Pack:
    """``batch`` as one packed row. Rows with one prompt share it.

    Nothing follows a completion's last token, so it is run only where its own state is wanted: ``ends``.
    """
    prompts, completions = batch.prompt_lengths.cpu(), batch.completion_lengths.cpu()
    run = completions - (0 if ends else 1)
    by_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(batch.prompt_index.tolist()):
        by_prompt.setdefault(prompt, []).append(row)
    groups = sorted(by_prompt.values(), key=lambda rows: len(rows) == 1)
    branched = [rows for rows in groups if len(rows) > 1]
    first = torch.tensor([rows[0] for rows in groups])
    branch_rows = torch.tensor([row for rows in branched for row in rows], dtype=torch.int64)
    size = torch.tensor([len(rows) for rows in branched], dtype=torch.int64)

    trunk_lengths = prompts[first].clone()
    trunk_lengths[len(branched) :] += run[first[len(branched) :]]
    lengths = torch.cat([trunk_lengths, run[branch_rows]])
    starts = lengths.cumsum(0) - lengths
    trunk_shape = (len(groups), int(trunk_lengths.max()))
    branch_shape = (len(branched), int(size.max()), int(run[branch_rows].max())) if branched else (0, 0, 0)
    member = ranges(torch.arange(len(branched)) * branch_shape[1], size)
    corners = torch.cat([torch.arange(len(groups)) * trunk_shape[1], math.prod(trunk_shape) + member * branch_shape[2]])
    places = ranges(corners, lengths)
    grids = torch.zeros(math.prod(trunk_shape) + math.prod(branch_shape), dtype=torch.int64)
    grids[places] = torch.arange(len(places))
    trunks, branches = grids.split([math.prod(trunk_shape), math.prod(branch_shape)])

    rows = torch.cat([first, branch_rows])
    offsets = torch.cat([torch.zeros_like(first), prompts[branch_rows]])
    trunk_of = torch.zeros_like(prompts)
    for start, members in zip(starts.tolist(), groups, strict=False):
        trunk_of[members] = start
    completion_start = trunk_of + prompts
    completion_start[branch_rows] = starts[len(groups) :]
    states = ranges(completion_start - 1, completions)
    states[completions.cumsum(0) - completions] = trunk_of + prompts - 1
    device = batch.ids.device
    return Pack(
        ids=batch.ids.flatten()[ranges(rows * batch.ids.size(1) + offsets, lengths).to(device)].unsqueeze(0),
        positions=ranges(offsets, lengths).unsqueeze(0).to(device),
        layout=GroupLayout(
            trunks=trunks.view(trunk_shape).to(device),
            branches=branches.view(branch_shape).to(device),
            prefix_lengths=trunk_lengths[: len(branched)].to(device),
            longest_prefix=int(trunk_lengths[: len(branched)].max()) if branched else 0,
            places=places.to(device),
        ),
        states=states.to(device),
        ends=(completion_start + completions - 1).to(device),
    )


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[i], starts[i] + 1, ... of ``lengths[i]`` numbers each, one after the other."""
    skipped = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(skipped, lengths) + torch.arange(int(lengths.sum()))
