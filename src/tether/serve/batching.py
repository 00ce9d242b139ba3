"""Texts of concurrent requests, scored together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tether.types import PromptCompletion

Pending = tuple[Sequence[PromptCompletion], asyncio.Future[list[float]]]
"""The rows of a request, and where its scores go."""


class FullError(Exception):
    """There are as many texts as may wait; ``seconds`` is about how long they take."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many texts wait already; try again in {seconds} s")
        self.seconds = seconds


@dataclass
class Counts:
    """What a server has done."""

    requests: dict[int, int] = field(default_factory=dict)
    """By the status of the answer."""
    request_seconds: float = 0.0
    texts: int = 0
    tokens: int = 0
    batches: int = 0
    batch_seconds: float = 0.0

    def answered(self, status: int, seconds: float) -> None:
        self.requests[status] = self.requests.get(status, 0) + 1
        self.request_seconds += seconds


@dataclass
class Batcher:
    """Scores what waits, in one call of ``score`` after the other, in a thread of its own.

    A batch is what waits when the last one is done, in the order in which it came, up to ``token_budget`` tokens; one
    request is never split, so it may be larger. All in one event loop.
    """

    score: Callable[[Sequence[PromptCompletion]], list[float]]
    token_budget: int
    queue_limit: int
    """Texts that may be in the server at a time."""
    counts: Counts = field(default_factory=Counts)
    held: int = 0
    """Texts in the server: read, waiting or scored at the moment."""
    waiting: deque[Pending] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def place(self, texts: int) -> Iterator[None]:
        """Room for the texts of a request. Raises :class:`FullError` where there is none."""
        if self.held + texts > self.queue_limit:
            per_text = self.counts.batch_seconds / self.counts.texts if self.counts.texts else 0.0
            raise FullError(min(60, max(1, math.ceil(per_text * self.held))))
        self.held += texts
        try:
            yield
        finally:
            self.held -= texts

    async def scores(self, rows: Sequence[PromptCompletion]) -> list[float]:
        """The scores of ``rows``, once it is their turn."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.waiting.append((rows, future))
        self.arrived.set()
        return await future

    async def run(self) -> None:
        """Score until cancelled."""
        with ThreadPoolExecutor(1, thread_name_prefix="tether-scores") as thread:
            while True:
                await self.arrived.wait()
                await self.answer(self.take(), thread)

    async def answer(self, batch: Sequence[Pending], thread: ThreadPoolExecutor) -> None:
        """Score one batch. What goes wrong is the answer to each of its requests."""
        rows = [row for part, _ in batch for row in part]
        started = time.monotonic()
        try:
            found = iter(await asyncio.get_running_loop().run_in_executor(thread, self.score, rows))
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for part, future in batch:
            own = [next(found) for _ in part]
            if not future.done():  # as one is whose client has gone
                future.set_result(own)
        self.counts.batches += 1
        self.counts.batch_seconds += time.monotonic() - started
        self.counts.texts += len(rows)
        self.counts.tokens += total(rows)

    def take(self) -> list[Pending]:
        """The next batch."""
        batch: list[Pending] = []
        tokens = 0
        while self.waiting and (not batch or tokens + total(self.waiting[0][0]) <= self.token_budget):
            batch.append(self.waiting.popleft())
            tokens += total(batch[-1][0])
        if not self.waiting:
            self.arrived.clear()
        return batch


def total(rows: Sequence[PromptCompletion]) -> int:
    """Tokens of ``rows``."""
    return sum(len(before) + len(after) for before, after in rows)
