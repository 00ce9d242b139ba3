"""The rows of a rollout: the completions in flight, and their places in the cache and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tether.generation.cache import aligned
from tether.generation.environment import Observation
from tether.generation.episodes import Episode
from tether.types import Completion, FinishReason


@dataclass(eq=False)
class InFlight:
    """A completion that waits or is being sampled, as the host knows it."""

    request: int
    seed: int
    job: int
    """Its number among all completions of the rollout."""
    episode: Episode | None = None
    """Where it has several turns; ``ids`` are then those of the episode."""
    ids: list[int] = field(default_factory=list)
    """The tokens that the host has looked at."""
    sampled: int = 0
    """Tokens that the device has sampled, or was given."""
    answer: Future[Observation] | None = None
    """What its environment says, while that is not known."""

    def hear(self) -> None:
        """Take the answer, which is there."""
        assert self.episode is not None
        assert self.answer is not None
        self.episode.answered(self.answer.result())
        self.answer = None


def in_flight(seeds: Sequence[Sequence[int]], episodes: Sequence[Sequence[Episode]]) -> list[InFlight]:
    """The completions of each request by their ``seeds``, and their ``episodes``, where there are any."""
    rows: list[InFlight] = []
    for i, own in enumerate(seeds):
        for k, seed in enumerate(own):
            row = InFlight(request=i, seed=seed, job=len(rows))
            if episodes:
                row.episode = episodes[i][k]
                row.ids = row.episode.ids
            rows.append(row)
    return rows


@dataclass(frozen=True)
class DeviceRows:
    """The rows on the device, [capacity] int64 each. Tensors are only changed in place, so that graphs can replay."""

    token: Tensor
    """The last token sampled, which the next step runs."""
    count: Tensor
    """Tokens sampled so far; at least 1 in empty rows."""
    prompt_length: Tensor
    job: Tensor
    """In rows that are not sampled, a number that no completion has."""

    @staticmethod
    def empty(capacity: int, *, job: int, device: torch.device) -> DeviceRows:
        token, count, prompt_length, jobs = (
            torch.full((capacity,), value, dtype=torch.int64, device=device) for value in (0, 1, 1, job)
        )
        return DeviceRows(token, count, prompt_length, jobs)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token, self.count, self.prompt_length, self.job

    def move(self, targets: Tensor, sources: Tensor) -> None:
        """Copy the rows at ``sources`` to ``targets``."""
        for tensor in self.tensors():
            tensor[targets] = tensor[sources]

    def put(self, places: Sequence[int], rows: Sequence[InFlight], prompt_lengths: Sequence[int]) -> None:
        """What the host knows of ``rows``, at ``places``."""
        values = (
            [row.ids[-1] if row.ids else 0 for row in rows],
            [len(row.ids) for row in rows],
            list(prompt_lengths),
            [row.job for row in rows],
        )
        at = torch.tensor(places, device=self.token.device)
        for tensor, column in zip(self.tensors(), values, strict=True):
            tensor[at] = torch.tensor(column, device=tensor.device)


def arranged(
    before: Sequence[InFlight], active: Sequence[InFlight], waiting: Sequence[InFlight]
) -> tuple[list[InFlight], list[InFlight], list[int], list[int]]:
    """The rows ``active`` at the first places and ``waiting`` at the next, each where it was ``before`` if it can be;
    and the moves, ``(active, waiting, targets, sources)``. A row that was not there before has none."""
    place = {id(row): at for at, row in enumerate(before)}
    count = len(active)
    seats: list[InFlight | None] = [None] * (count + len(waiting))
    for members, low, high in ((active, 0, count), (waiting, count, len(seats))):
        movers = []
        for row in members:
            at = place.get(id(row), -1)
            if low <= at < high:
                seats[at] = row
            else:
                movers.append(row)
        movers.sort(key=lambda row: place.get(id(row), len(before) + row.job))
        free = iter(at for at in range(low, high) if seats[at] is None)
        for row in movers:
            seats[next(free)] = row
    rows = [row for row in seats if row is not None]
    moves = [(at, place[id(row)]) for at, row in enumerate(rows) if place.get(id(row), at) != at]
    return rows[:count], rows[count:], [target for target, _ in moves], [source for _, source in moves]


def gaps(gone: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """The places among the first ones that are ``gone`` of ``count``, and those of the last ones, which take them."""
    left = count - len(gone)
    return [place for place in gone if place < left], sorted(set(range(left, count)) - set(gone))


def close(members: list[Any], targets: Sequence[int], sources: Sequence[int], gone: int) -> None:
    """Put the ``members`` at ``sources`` to ``targets``, and drop the last ``gone``; an empty list stays empty."""
    if not members:
        return
    for target, source in zip(targets, sources, strict=True):
        members[target] = members[source]
    del members[len(members) - gone :]


def shown_tokens(rows: Sequence[InFlight], prompt_lengths: Sequence[int], new: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``new`` tokens of each row before its last one, and their positions, [aligned rows, new]; and how many tokens
    each row has without its last one, [n]."""
    ids, positions = torch.zeros(2, aligned(len(rows)), new, dtype=torch.int64)
    counts = torch.tensor([len(row.ids) - 1 for row in rows])
    ids[: len(rows)] = torch.tensor([row.ids[-new - 1 : -1] for row in rows])
    positions[: len(rows)] = (torch.tensor(prompt_lengths) + counts).unsqueeze(1) + torch.arange(-new, 0)
    return ids, positions, counts


def completion_of(
    row: InFlight,
    logprobs: Sequence[float],
    routes: Sequence[int] | None,
    *,
    text: str,
    finish_reason: FinishReason | None,
    version: int,
) -> Completion:
    """The completion of a row that is over; ``logprobs`` and ``routes`` are those of its tokens, and others after them,
    and hold anything where the policy did not emit the token."""
    assert finish_reason is not None
    episode, count = row.episode, len(row.ids)
    mask = [True] * count if episode is None else episode.mask
    return Completion(
        ids=tuple(row.ids),
        mask=tuple(mask),
        sampler_logp=tuple(logp if own else 0.0 for logp, own in zip(logprobs[:count], mask, strict=True)),
        finish_reason=finish_reason,
        text=text,
        weights_version=version,
        routes=None if routes is None else tuple(routes[:count]),
        turns=() if episode is None else tuple(episode.turns),
        messages=tuple(episode.messages) if episode is not None and episode.messages else None,
    )
