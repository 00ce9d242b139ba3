"""Groups packed in one row: each prompt once, then each of its completions, which sees the prompt and itself.

The linear layers, nearly all of the arithmetic, then run once per distinct token and without padding. Only attention
lays the tokens out on grids: the prompts' [P, L] and the completions' [P, G, T]. A prompt with a single completion
forms one causal sequence with it, and so does each completion of a prompt without a token: there is nothing to share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.models.attention import Layer
from tether.ops.attention import causal_attention, shared_prefix_attention, window_bias
from tether.ops.reduce import length_mask
from tether.types import Batch

SLACK = 1.25
"""Maximum factor by which padding may enlarge attention."""
SMALL = 2**18
"""Number of scores up to which an attention is too small for its padding to matter."""

Biases = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of trunks on themselves, branches on trunks, and branches on themselves; None where causal or all seen."""


@dataclass(frozen=True)
class Block:
    """Groups of similar size on the grids of one attention call: the prompts' [P, L] and the completions' [P, G, T].

    If each prompt has a single completion, the completion is part of the trunk, and G is 0.
    """

    trunks: tuple[int, int]  # P, L
    branches: tuple[int, int, int]  # P, G, T
    trunk_lengths: Tensor  # [P] int64
    biases: dict[int | None, Biases] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of places of the trunks and of the branches."""
        return math.prod(self.trunks), math.prod(self.branches)

    def attend(self, layer: Layer, trunk: Sequence[Tensor], branch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs [P * L, H, d] and [P * G * T, H, d], for q, k and v of the trunks and of the branches."""
        q_trunk, k_trunk, v_trunk = (x.view(*self.trunks, *x.shape[1:]) for x in trunk)
        trunk_bias, prefix_bias, branch_bias = self.biases_for(layer.window)
        from_trunks = causal_attention(
            q_trunk, k_trunk, v_trunk, bias=trunk_bias, scale=layer.scale, softcap=layer.softcap
        ).flatten(0, 1)
        if not self.sizes[1]:
            return from_trunks, branch[0]
        q, k, v = (x.view(*self.branches, *x.shape[1:]) for x in branch)
        from_branches = shared_prefix_attention(
            q,
            k,
            v,
            k_trunk,
            v_trunk,
            prefix_bias=prefix_bias,
            bias=branch_bias,
            scale=layer.scale,
            softcap=layer.softcap,
        )
        return from_trunks, from_branches.flatten(0, 2)

    def biases_for(self, window: int | None) -> Biases:
        """The biases for layers with this window."""
        if window not in self.biases:
            self.biases[window] = self._make_biases(window)
        return self.biases[window]

    def _make_biases(self, window: int | None) -> Biases:
        (groups, members, width), longest = self.branches, self.trunks[1]
        at = torch.arange(max(longest, width), device=self.trunk_lengths.device)

        def own(length: int) -> Tensor | None:
            if window is None or window >= length:
                return None
            return window_bias(at[:length], at[:length], window)[None, None]

        keys = at[:longest].expand(groups, longest)
        real = keys < self.trunk_lengths.unsqueeze(1)
        prefix = torch.where(real, 0.0, -torch.inf)[:, None, None]
        if window is not None and window < longest + width:
            positions = self.trunk_lengths.unsqueeze(1) + at[:width].repeat(members)
            prefix = prefix + window_bias(positions, keys, window).unsqueeze(1)
        elif real.all():
            return own(longest), None, own(width)
        return own(longest), prefix, own(width)


@dataclass(frozen=True)
class GroupLayout:
    """The place of each token of a packed row, and what it sees: a :class:`tether.models.attention.Layout`."""

    blocks: tuple[Block, ...]
    grids: Tensor
    """[C] int64: the token at each place of the blocks' grids, one grid after the other; 0 at empty places, whose
    results are never read."""
    places: Tensor
    """[N] int64: the place of each token."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [size for block in self.blocks for size in block.sizes]
        # laid out in one operation and then split, so that the gradient is assembled in one operation too
        laid = [x.squeeze(0).transpose(0, 1).index_select(0, self.grids).split(sizes) for x in (q, k, v)]
        parts = list(zip(*laid, strict=True))
        out = [
            part
            for block, trunk, branch in zip(self.blocks, parts[::2], parts[1::2], strict=True)
            for part in block.attend(layer, trunk, branch)
        ]
        return torch.cat(out).index_select(0, self.places).unsqueeze(0)


@dataclass(frozen=True)
class Pack:
    """A batch as one row of distinct tokens."""

    ids: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64
    layout: GroupLayout
    states: Tensor  # [n] int64: the place of s_t for every token that the policy emitted, row by row
    ends: Tensor  # [B] int64: the place of each row's last token, if that was packed
    runs: tuple[list[int], list[int]]
    """Of each run of tokens in the row: how many rows share it, and its length."""

    def rows_per_token(self) -> Tensor:
        """How many rows each token stands for, [N] int64."""
        return torch.repeat_interleave(*map(torch.tensor, self.runs))


@dataclass(frozen=True)
class Group:
    """The rows of one prompt, and how many of their tokens are run."""

    rows: list[int]
    trunk: int
    branches: list[int]
    """Lengths of the branches; empty if there is a single row, which is in the trunk."""

    def scores(self, trunk: int, width: int) -> int:
        """Number of its attention scores on grids of these sizes."""
        return trunk**2 + len(self.branches) * width * (trunk + width)

    @property
    def width(self) -> int:
        return max(self.branches, default=0)


def in_blocks(groups: list[Group]) -> list[list[Group]]:
    """Groups of similar size together; all groups of a block have the same number of branches."""
    blocks: list[list[Group]] = []
    exact = trunk = width = 0
    for group in sorted(groups, key=lambda group: (-len(group.branches), -group.trunk, -group.width)):
        widest = max(width, group.width)
        if blocks and len(blocks[-1][0].branches) == len(group.branches):
            together = (len(blocks[-1]) + 1) * group.scores(trunk, widest)
            alone = exact + group.scores(group.trunk, group.width)
            if together <= max(SMALL, SLACK * alone):
                blocks[-1].append(group)
                exact, width = alone, widest
                continue
        blocks.append([group])
        trunk, width, exact = group.trunk, group.width, group.scores(group.trunk, group.width)
    return blocks


def sharing(batch: Batch) -> list[list[int]]:
    """The rows of ``batch`` by prompt; a row whose prompt has no token is on its own."""
    by_prompt: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, length) in enumerate(
        zip(batch.prompt_index.tolist(), batch.prompt_lengths.tolist(), strict=True)
    ):
        by_prompt.setdefault((prompt, -1 if length else row), []).append(row)
    return list(by_prompt.values())


def pack(batch: Batch, *, ends: bool) -> Pack:
    """``batch`` as one packed row. Rows with the same prompt share it.

    Nothing follows a completion's last token, so it is run only if its own state is needed: ``ends``. Without ``ends``
    the state before each completion's first token is needed, and a prompt without a token, which has none, raises
    ValueError.
    """
    prompts: list[int] = batch.prompt_lengths.tolist()
    completions: list[int] = batch.completion_lengths.tolist()
    if not ends and 0 in prompts:
        raise ValueError("a prompt has no token, so there is no state that predicts its completion's first token")
    run = [length - (0 if ends else 1) for length in completions]
    groups = [
        Group(rows, prompts[rows[0]], [run[row] for row in rows])
        if len(rows) > 1
        else Group(rows, prompts[rows[0]] + run[rows[0]], [])
        for rows in sharing(batch)
    ]

    device, width = batch.ids.device, batch.ids.size(1)
    # of each run of tokens: where it is in the batch, its first position, its length, its place on the grids, its rows
    sources: list[int] = []
    offsets: list[int] = []
    lengths: list[int] = []
    corners: list[int] = []
    shared_by: list[int] = []
    first_token = [0] * len(batch)  # of each row's trunk, in the packed row
    completion_start = [0] * len(batch)
    packed = corner = 0
    blocks: list[Block] = []
    for members in in_blocks(groups):
        block = Block(
            trunks=(len(members), max(group.trunk for group in members)),
            branches=(len(members), len(members[0].branches), max(group.width for group in members)),
            trunk_lengths=torch.tensor([group.trunk for group in members], device=device),
        )
        blocks.append(block)
        for p, group in enumerate(members):
            sources.append(group.rows[0] * width)
            offsets.append(0)
            lengths.append(group.trunk)
            shared_by.append(len(group.rows))
            corners.append(corner + p * block.trunks[1])
            for row in group.rows:
                first_token[row], completion_start[row] = packed, packed + prompts[row]
            packed += group.trunk
        corner += block.sizes[0]
        for p, group in enumerate(members):
            for g, length in enumerate(group.branches):
                row = group.rows[g]
                sources.append(row * width + prompts[row])
                offsets.append(prompts[row])
                lengths.append(length)
                shared_by.append(1)
                corners.append(corner + (p * block.branches[1] + g) * block.branches[2])
                completion_start[row] = packed
                packed += length
        corner += block.sizes[1]

    places = ranges(corners, lengths)
    grids = torch.zeros(corner, dtype=torch.int64)
    grids[places] = torch.arange(packed)

    states = ranges([start - 1 for start in completion_start], completions)
    before = torch.tensor([first + prompt - 1 for first, prompt in zip(first_token, prompts, strict=True)])
    counts = torch.tensor(completions)
    states[counts.cumsum(0) - counts] = before
    return Pack(
        ids=batch.ids.flatten()[ranges(sources, lengths).to(device)].unsqueeze(0),
        positions=ranges(offsets, lengths).unsqueeze(0).to(device),
        layout=GroupLayout(blocks=tuple(blocks), grids=grids.to(device), places=places.to(device)),
        states=states.to(device)[batch.mask[length_mask(batch.completion_lengths, batch.mask.size(1)).to(device)]],
        ends=(torch.tensor(completion_start) + counts - 1).to(device),
        runs=(shared_by, lengths),
    )


def ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The ranges starts[i], starts[i] + 1, ... of ``lengths[i]`` numbers, concatenated."""
    counts = torch.tensor(lengths)
    skipped = torch.tensor(starts) - (counts.cumsum(0) - counts)
    return torch.repeat_interleave(skipped, counts) + torch.arange(int(counts.sum()))
