"""Rewards that wait for something elsewhere, an async function or a server: they wait at the same time.

The main thread supervises them: each has its own deadline and is retried on its own. It is never inside their code, so
a coroutine that blocks the event loop ends at its deadline too.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tether import stop_requests
from tether.errors import RewardError
from tether.event_loop import Call, begun
from tether.rewards.process import Apart
from tether.rewards.supervision import FIRST_PAUSE, again, late, next_pause

T = TypeVar("T")

AT_ONCE = 16
"""Rewards that wait at the same time."""


@dataclass(frozen=True, kw_only=True)
class Waiting(Generic[T]):
    """A call of the reward ``name`` that waits, and how it is supervised."""

    name: str
    start: Callable[[], Awaitable[T]]
    """One try. It raises :class:`RewardError` for whatever goes wrong."""
    deadline: float | None = None
    """Seconds of a try; None for no limit."""
    retries: int = 0
    apart: Apart = field(default_factory=Apart)
    """What its code sets for the whole process."""


@dataclass
class Tries(Generic[T]):
    """How far one call is."""

    call: Waiting[T]
    due: float
    """When the next try begins, by the monotonic clock."""
    count: int = 0
    wait: float = field(default_factory=lambda: FIRST_PAUSE)
    running: Call | None = None
    ends: float | None = None
    """When the deadline of the running try is."""
    result: list[T] = field(default_factory=list)
    """The result, once it is there."""

    def begin(self, now: float) -> None:
        self.count += 1
        self.running = begun(self.call.start())
        self.ends = None if self.call.deadline is None else now + self.call.deadline

    def settle(self, now: float) -> None:
        """Take the outcome of a try that has ended or has run past its deadline. Raises the error of the last try."""
        assert self.running is not None
        try:
            if self.running.outcome.done():
                self.result.append(self.running.outcome.result())
            elif self.ends is not None and now >= self.ends:
                raise late(self.call.name, self.call.deadline)
            else:
                return
        except RewardError as error:
            stop_requests.check()  # a request to stop may have become an error
            print(again(error, self.count, self.call.retries, self.wait), file=sys.stderr, flush=True)
            self.due, self.wait = now + self.wait, next_pause(self.wait)
        self.give_up()

    @property
    def over(self) -> bool:
        """Whether the running try has ended."""
        return self.running is not None and self.running.outcome.done()

    def give_up(self) -> None:
        """End the running try, if there is one."""
        if self.running is not None:
            self.running.give_up()
        self.running = None


def together(calls: Sequence[Waiting[T]]) -> list[T]:
    """The results of ``calls``, as :func:`finished` finds them."""
    return finished([Tries(call, due=time.monotonic()) for call in calls])


def finished(all_tries: Sequence[Tries[T]]) -> list[T]:
    """The results of calls, which wait at the same time, at most :data:`AT_ONCE` of them; some may have begun.

    A try that fails or runs past its deadline is repeated after a pause, up to ``retries`` times. The error of a last
    try ends all calls, as a request to stop does. What the code of one call sets for the whole process, the others see
    while they run; it is undone after all of them.
    """
    with contextlib.ExitStack() as stack:
        for apart in {id(one.call.apart): one.call.apart for one in all_tries}.values():
            stack.enter_context(apart.inside())
        try:
            while unfinished := [one for one in all_tries if not one.result]:
                _advance(unfinished)
        finally:
            for one in all_tries:
                one.give_up()
    return [one.result[0] for one in all_tries]


def _advance(unfinished: Sequence[Tries[Any]]) -> None:
    """Begin the tries that are due, wait until something happens, and settle what has happened."""
    with stop_requests.at_once():
        now = time.monotonic()
        free = AT_ONCE - sum(one.running is not None for one in unfinished)
        for one in [one for one in unfinished if one.running is None and one.due <= now][:free]:
            one.begin(now)
        running = [one for one in unfinished if one.running is not None]
        times = [one.ends for one in running if one.ends is not None]
        times += [one.due for one in unfinished if one.running is None and one.due > now]
        pause = max(0.0, min(times) - now) if times else None
        if running:
            wait(outcomes(running), timeout=pause, return_when=FIRST_COMPLETED)
        elif pause:
            time.sleep(pause)
    stop_requests.check()
    now = time.monotonic()
    for one in running:
        one.settle(now)


def outcomes(running: Sequence[Tries[Any]]) -> list[Future[Any]]:
    return [one.running.outcome for one in running if one.running is not None]
