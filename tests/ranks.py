"""Several ranks in one process, a thread each: a World whose collective calls meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Meeting:
    """Where the ranks leave their values for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class ThreadRank:
    """A :class:`tether.world.World` of threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.size = len(meeting.values)
        self.calls: list[str] = []
        """Names of the collective calls, to see that all ranks make the same ones."""

    def gather(self, value: Any) -> list[Any]:
        self.calls.append("gather")
        return self._meet(value)

    def sum(self, value: Any) -> Any:
        self.calls.append("sum")
        first, *others = self._meet(value)
        for other in others:
            first = first + other
        return first

    def max(self, value: Any) -> Any:
        self.calls.append("max")
        return max(self._meet(value))

    def any(self, flag: bool) -> bool:
        self.calls.append("any")
        return any(self._meet(flag))

    def _meet(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values


def on_ranks(size: int, run: Callable[[ThreadRank], Any]) -> list[Any]:
    """What ``run(world)`` gives on each of ``size`` ranks. Raises the first error, and checks that all ranks made the
    same collective calls."""
    meeting = Meeting(size)
    worlds = [ThreadRank(rank, meeting) for rank in range(size)]
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(world: ThreadRank) -> None:
        try:
            found[world.rank] = run(world)
        except threading.BrokenBarrierError:
            pass  # another rank's error is the cause
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(world,)) for world in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(world.calls == worlds[0].calls for world in worlds)
    return found
