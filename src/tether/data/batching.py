"""Which rows go where: the order of an epoch, the minibatches of an update, the micro-batches of a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.seeds import generator

T = TypeVar("T")


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..count-1 that is a function of ``(count, seed, epoch)`` alone."""
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


@dataclass
class Cursor:
    """Walks over ``count`` rows, epoch after epoch, each in its own order. ``position`` is all there is to save."""

    count: int
    seed: int
    position: int = 0

    def take(self, rows: Sequence[T], n: int) -> list[T]:
        """The next ``n`` of ``rows``, going on into the next epoch where this one ends."""
        if len(rows) != self.count:
            raise ValueError(f"the cursor walks over {self.count} rows, got {len(rows)}")
        taken: list[T] = []
        while len(taken) < n:
            epoch, offset = divmod(self.position, self.count)
            order = epoch_order(self.count, seed=self.seed, epoch=epoch)[offset : offset + n - len(taken)]
            taken += [rows[i] for i in order]
            self.position += len(order)
        return taken


def minibatches(count: int, parts: int, *, seed: int) -> list[Tensor]:
    """A random partition of 0..count-1 into ``parts`` index tensors whose sizes differ by one at most."""
    if not 1 <= parts <= count:
        raise ConfigError(f"minibatches must lie in 1..{count}, the completions of a step, and is {parts}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(parts)]


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Index tensors that cover every row once, rows of like length together, each at most ``token_budget`` tokens
    of [rows, longest row] (a single row may exceed it). ``lengths`` [B].

    How rows are cut never changes a gradient: denominators are counted before.
    """
    sizes: list[int] = lengths.tolist()  # once: each look at a tensor on another device waits for it
    parts: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        longest = sizes[parts[-1][0]] if parts else 0
        if parts and (len(parts[-1]) + 1) * longest <= token_budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return [torch.tensor(part, device=lengths.device) for part in parts]
