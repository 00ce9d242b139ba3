"""One event loop for all async rewards and environments, in a thread of its own.

A client that a reward file makes once, for the whole run, belongs to the loop of its first use. A notebook's thread has
a loop already, so this one has its own thread; it is a daemon, so that a call that hangs does not keep the process from
ending.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

GRACE = 1.0
"""Seconds in which a call that was cancelled has to end."""


@dataclass(frozen=True)
class Call:
    """A call that runs in the loop."""

    thread: LoopThread
    outcome: Future[Any] = field(default_factory=Future)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def give_up(self) -> None:
        """Cancel it, unless it has ended, and do not wait for it."""
        if not self.outcome.done():
            self.thread.given_up.append(self.outcome)
            self.thread.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])


class LoopThread:
    """A running loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.given_up: list[Future[Any]] = []
        self.thread = threading.Thread(target=self._run, name="tether-async-calls", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    @property
    def busy(self) -> bool:
        """Whether a call that was given up has not ended, :data:`GRACE` seconds from now."""
        self.given_up = list(wait(self.given_up, timeout=GRACE).not_done)
        return bool(self.given_up)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def begin(self, awaitable: Awaitable[Any]) -> Call:
        """Run ``awaitable`` in the loop."""
        call = Call(self)

        async def whole() -> None:
            try:
                call.outcome.set_result(await awaitable)
            except BaseException as error:  # SystemExit too: it ends the call, not the loop
                call.outcome.set_exception(error)

        self.loop.call_soon_threadsafe(lambda: call.tasks.append(self.loop.create_task(whole())))
        return call

    def close(self) -> None:
        """End the loop, unless something blocks it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=1.0)
        if not self.thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.close()


_current: LoopThread | None = None


def begun(awaitable: Awaitable[Any]) -> Call:
    """``awaitable``, running in the loop of all calls.

    A call that was given up, at its deadline say, and has not ended blocks that loop or ignores its cancellation; the
    next call then gets a new loop.
    """
    global _current
    if _current is None or _current.busy or not _current.thread.is_alive():
        _current = LoopThread()
    return _current.begin(awaitable)


def awaited(awaitable: Awaitable[Any]) -> Any:
    """The result of ``awaitable`` in the loop of all calls. What ends the wait early cancels it, and does not wait for
    it."""
    call = begun(awaitable)
    try:
        return call.outcome.result()
    finally:
        call.give_up()
