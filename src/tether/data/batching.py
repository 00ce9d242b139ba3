"""How rows are ordered and grouped: epochs, the minibatches of an update, the micro-batches of a backward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.seeds import generator
from tether.types import Batch

T = TypeVar("T")


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..count-1 that depends on ``(count, seed, epoch)`` alone."""
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def epoch_steps(epochs: float, *, count: int, batch_size: int) -> int:
    """Steps of ``batch_size`` of ``count`` rows that ``epochs`` take, at least 1.

    Each epoch takes every row once, so its last step may have fewer rows; a fraction of an epoch is rounded up in
    steps. The fraction is that of the decimal number: 0.1 of 40 rows is 4 rows.
    """
    whole, part = divmod(Fraction(repr(float(epochs))), 1)
    return max(1, int(whole) * math.ceil(count / batch_size) + math.ceil(part * count / batch_size))


@dataclass
class Cursor:
    """Walks over ``count`` rows, epoch after epoch, each in its own order. ``position`` is its only state."""

    count: int
    seed: int
    position: int = 0

    def take(self, rows: Sequence[T], n: int) -> list[T]:
        """The next ``n`` of ``rows``, continued in the next epoch where this one ends."""
        if len(rows) != self.count:
            raise ValueError(f"the cursor walks over {self.count} rows, got {len(rows)}")
        taken: list[T] = []
        while len(taken) < n:
            epoch, offset = divmod(self.position, self.count)
            order = epoch_order(self.count, seed=self.seed, epoch=epoch)[offset : offset + n - len(taken)]
            taken += [rows[i] for i in order]
            self.position += len(order)
        return taken

    def take_in_epoch(self, rows: Sequence[T], n: int) -> list[T]:
        """The next ``n`` of ``rows``, or as many as are left of this epoch."""
        return self.take(rows, min(n, self.count - self.position % self.count))

    @contextlib.contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Restore the position where the block raises."""
        position = self.position
        try:
            yield
        except BaseException:
            self.position = position
            raise


def minibatches(count: int, parts: int, *, seed: int) -> list[Tensor]:
    """A random partition of 0..count-1 into ``parts`` index tensors whose sizes differ by at most one."""
    if not 1 <= parts <= count:
        raise ConfigError(f"minibatches must lie in 1..{count}, the completions of a step, and is {parts}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(parts)]


def micro_batches(batch: Batch, token_budget: int) -> list[Tensor]:
    """Index tensors that cover every row of ``batch`` once, each of at most ``token_budget`` tokens (a single row may
    exceed it); see :func:`within_budget`."""
    return within_budget(
        batch.completion_lengths.tolist(), batch.prompt_lengths.tolist(), batch.prompt_index.tolist(), token_budget
    )


def within_budget(own: Sequence[int], shared: Sequence[int], owner: Sequence[int], token_budget: int) -> list[Tensor]:
    """Split items into parts of at most ``token_budget`` tokens, those of one owner together where they fit.

    Item i takes ``own[i]`` tokens, and ``shared[i]`` more unless its part already holds an item of the same
    ``owner[i]``. Owners of similar length are adjacent, which keeps attention's grids full. The split never changes a
    gradient, because denominators are counted before it.
    """
    longest: dict[int, int] = {}
    for size, who in zip(own, owner, strict=True):
        longest[who] = max(size, longest.get(who, 0))
    parts: list[list[int]] = []
    used, present = 0, set[int]()
    for i in sorted(range(len(own)), key=lambda i: (-longest[owner[i]], owner[i], -own[i])):
        cost = own[i] + (0 if owner[i] in present else shared[i])
        if parts and used + cost <= token_budget:
            parts[-1].append(i)
        else:
            parts.append([i])
            used, present, cost = 0, set(), own[i] + shared[i]
        used += cost
        present.add(owner[i])
    return [torch.tensor(part) for part in parts]
