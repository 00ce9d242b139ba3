"""The rollout engine of this process: each prompt through the model once, its keys stored once for all its completions.

Requests are taken in bands of like prompt lengths, and each band is a rollout (:mod:`tether.generation.scheduler`)
within the budget for rows and for the cache, so that a call may ask for any number of completions. A completion
depends on its own seed alone: on a CPU in float32 bit by bit, whatever the batch, its place in it and the order of
requests (:mod:`tether.generation.cache` says what that takes); elsewhere up to the rounding of products in other
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import EpisodeError, ModelError
from tether.generation.cache import Pool, extent
from tether.generation.checks import check_samples
from tether.generation.episodes import Calls, Episode, Episodes
from tether.generation.scheduler import Rollout
from tether.generation.stopping import Ending
from tether.generation.tally import Room, Tally
from tether.generation.unpacked import complete
from tether.models.loading import context_length
from tether.models.memory import within_memory
from tether.models.policy import replace_weights
from tether.models.unpacked import is_unpacked
from tether.stop_requests import at_safe_points
from tether.types import Budget, Completion, Metrics, Request, RolloutGroup, Sampling

Begun = tuple[Request, list[Episode]]
"""A request, and its episodes, if completions are episodes."""
CACHE_GIB = 4.0
"""For the cache on a CPU, unless the budget says otherwise."""


class Engine:
    """A :class:`tether.types.Generator` that samples from the very module that is being trained: no weights are copied
    as long as :meth:`load_weights` is given that module's own tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        budget: Budget | None = None,
        episodes: Episodes | None = None,
        finished: Callable[[RolloutGroup], None] | None = None,
    ) -> None:
        """``episodes``: each completion is one, with an environment. ``finished`` is called with each group once all of
        its completions have ended, while others are still sampled; with some groups again where memory has run out."""
        self.model, self.tokenizer, self.budget = model, tokenizer, budget or Budget()
        self.episodes: Episodes | None = None
        self.finished: Callable[[RolloutGroup], None] | None = None
        self.version = 0
        self.tally = Tally()
        self.cached = True
        """Whether a model that is unpacked is decoded with the library's cache."""
        try:
            check_samples(self, model)
        except ModelError:
            if not is_unpacked(model):
                raise
            self.cached = False
            check_samples(self, model)
        if episodes is not None and is_unpacked(model):
            raise EpisodeError(
                f"{type(model).__name__} is computed without sharing prompts, and episodes need that",
                where=episodes.name,
                hint="docs/models.md says which models share them",
            )
        self.episodes, self.finished = episodes, finished
        self.tally = Tally()

    @at_safe_points()
    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into the model where they are not its own already; completions sampled from now on carry
        ``version``."""
        replace_weights(self.model, weights)
        self.version = version

    def figures(self) -> Metrics:
        """Tokens per second of prefill and of decoding, the share of rows in use, and the cache's memory."""
        return self.tally.metrics()

    @at_safe_points()
    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        """One group per request, with one completion per seed, in their order.

        Raises :class:`tether.errors.GuardError` where the logits are not finite, and
        :class:`tether.errors.MemoryShortError` where not even one completion at a time fits into memory.
        """
        self.tally = Tally()
        asked = [request for request in requests if request.seeds]
        begun = self._begin(asked, sampling)
        opened = [request if not own else replace(request, prompt=own[0].prompt) for request, own in begun]
        done: dict[int, RolloutGroup] = {}
        for band in bands([len(request.prompt.ids) for request in opened], self.model.device):

            def take(k: int, completions: list[Completion], band: Sequence[int] = band) -> None:
                group = RolloutGroup(prompt=opened[band[k]].prompt, completions=tuple(completions))
                done[band[k]] = group
                if self.finished is not None:
                    self.finished(group)

            self._roll_out([begun[k] for k in band], [opened[k] for k in band], sampling, take)
        numbers = iter(range(len(opened)))
        return [
            done[next(numbers)] if request.seeds else RolloutGroup(prompt=request.prompt, completions=())
            for request in requests
        ]

    def _begin(self, requests: Sequence[Request], sampling: Sampling) -> list[Begun]:
        """Each request, with new episodes where completions are episodes."""
        if self.episodes is None:
            return [(request, []) for request in requests]
        episodes = self.episodes.begin(requests, self.tokenizer, Ending.of(self.model, self.tokenizer, sampling))
        room = context_length(self.model) - sampling.max_new_tokens
        for own in episodes:
            if len(own[0].prompt.ids) > room:
                raise EpisodeError(
                    f"the prompt has {len(own[0].prompt.ids)} tokens with what the reset shows, and the context has "
                    f"room for {room}",
                    where=self.episodes.name,
                )
        return list(zip(requests, episodes, strict=True))

    def _roll_out(
        self,
        begun: Sequence[Begun],
        requests: Sequence[Request],
        sampling: Sampling,
        take: Callable[[int, list[Completion]], None],
    ) -> None:
        """Answer ``requests``, those of ``begun`` with what was shown first: ``take`` gets the number and the
        completions of each. Each time that memory runs out, half as many are in flight from then on, and all begin
        again."""
        one = partial(complete, self.model, self.tokenizer, sampling=sampling, version=self.version, cached=self.cached)
        fresh = [begun]

        def attempt(rows: int) -> None:
            if is_unpacked(self.model):
                for number, request in enumerate(requests):
                    take(number, one(request, max_rows=rows, tally=self.tally))
                return
            room = room_for(self.model, requests, sampling, replace(self.budget, max_rows=rows))
            roll = partial(Rollout, room=room, version=self.version, tally=self.tally, finished=take)
            if self.episodes is None:
                roll(self.model, self.tokenizer, requests, sampling).run()
                return
            episodes = [own for _, own in fresh.pop()] if fresh else self._again(begun, sampling)
            with Calls(self.episodes) as calls:
                roll(self.model, self.tokenizer, requests, sampling, episodes=episodes, calls=calls).run()

        asked = min(self.budget.max_rows, sum(len(request.seeds) for request in requests))
        _, rows = within_memory(attempt, asked)
        if rows < asked:
            self.budget = replace(self.budget, max_rows=rows)

    def _again(self, begun: Sequence[Begun], sampling: Sampling) -> list[list[Episode]]:
        """New episodes of the same requests."""
        return [own for _, own in self._begin([request for request, _ in begun], sampling)]


def bands(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Indices by prompt length, longest first, cut where a prompt takes less than half of the longest one's room: a
    pool has one capacity for all its slots."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and 2 * extent(lengths[i], device) >= extent(lengths[found[-1][0]], device):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def room_for(model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling, budget: Budget) -> Room:
    """The pools of a rollout of ``requests``, as large as ``budget`` allows and they need."""
    longest = max(len(request.prompt.ids) for request in requests)
    slot_tokens, row_tokens = (extent(n, model.device) for n in (longest, sampling.max_new_tokens))
    rows, slots = rows_and_slots(
        sum(len(request.seeds) for request in requests),
        len(requests),
        max_rows=budget.max_rows,
        cache_bytes=cache_bytes(budget, model.device),
        slot_tokens=slot_tokens,
        row_tokens=row_tokens,
        token_bytes=Pool.bytes_per_token(model),
    )
    return Room(rows=rows, row_tokens=row_tokens, slots=slots, slot_tokens=slot_tokens)


def cache_bytes(budget: Budget, device: torch.device) -> int:
    """Bytes that keys and values may take."""
    if budget.cache_gib is not None:
        return int(budget.cache_gib * 2**30)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(CACHE_GIB * 2**30)


def rows_and_slots(
    completions: int,
    prompts: int,
    *,
    max_rows: int,
    cache_bytes: int,
    slot_tokens: int,
    row_tokens: int,
    token_bytes: int,
) -> tuple[int, int]:
    """How many completions and prompts the cache holds at once, one of each at least.

    A row takes its own tokens and its share of a slot, by the mean size of a group. Where not all prompts fit, there
    are a quarter more slots than full groups need, because the completions of a group end at different times.
    """
    groups = completions > prompts
    share = slot_tokens * (1.25 if groups else 1.0) / (completions / prompts)
    affordable = int(cache_bytes / (token_bytes * (row_tokens + share)))
    rows = max(1, min(completions, max_rows, affordable))
    needed = -(-5 * rows * prompts // (4 * completions)) if groups else rows
    return rows, min(prompts, rows, needed)
