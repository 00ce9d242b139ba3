"""A tracker on a thread of its own. Where it fails or hangs, that is said once, and the run goes on without it."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from tether.trackers.identities import Identities
from tether.trackers.names import THREAD, TrackerName
from tether.trackers.rows import Backend, Ending, Row, TrackedRun
from tether.untrusted import one_line, shown

PATIENCE = 60.0
"""Seconds that one call of a tracker may take, and that a finished run waits for its trackers."""
PATIENCE_WHEN_STOPPED = 10.0
"""Seconds that a run which was interrupted waits for them: who interrupts it may kill it soon."""

Call = tuple[str, Callable[[], None]]
"""What is being done, in words, and the doing."""


class Supervised:
    """Takes rows at once, and gives them to the tracker one after the other.

    Training never waits for a tracker, but at the end of the run, and then for :data:`PATIENCE` seconds at most.
    """

    def __init__(self, name: TrackerName, backend: Backend, identities: Identities, *, quiet: bool = False) -> None:
        """Where ``quiet``, it does not say where the run is shown; it always says that it failed."""
        self.name, self.backend, self.identities = name, backend, identities
        self._tell_where = not quiet
        self.off = False
        """Whether it failed or hung. Nothing is given to it any more."""
        self.finished = False
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{THREAD}{name}", daemon=True)
        self._doing: tuple[str, float] | None = None
        """What the thread is doing, and since when by the monotonic clock."""
        self._failure: tuple[str, BaseException] | None = None
        self._identity: dict[str, str] = {}
        self._last = 0
        """The last step that the tracker has."""

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self, run: TrackedRun) -> None:
        identity = self.identities.identity(self.name)
        self._last = self.identities.step(self.name) if identity else 0

        def begin() -> None:
            self._identity = dict(self.backend.start(replace(run, identity=identity)))
            self.identities.keep(self.name, self._identity, self._last)

        self._thread.start()
        self._give("at its start", begin)

    def log(self, row: Row) -> None:
        def send() -> None:
            if row.step <= self._last and not self.backend.rewinds:
                return  # from before the run was interrupted; a repeated step has the same numbers
            self.backend.log(row)
            self._last = row.step
            self.identities.keep(self.name, self._identity, self._last)

        self._give(f"in step {row.step}", send)

    def finish(self, ending: Ending) -> None:
        self.finished = True
        self._give("at the end", lambda: self.backend.finish(ending))

    def close(self) -> None:
        """Wait until everything is sent, for a while."""
        if not self.started:
            return
        patience = PATIENCE if self.finished else PATIENCE_WHEN_STOPPED
        self._give("at its close", lambda: self.backend.close(finished=self.finished))
        self._calls.put(None)
        if not self.off:
            self._thread.join(patience)
        if not self.off and self._failure is None and self._thread.is_alive():
            self._give_up(f"still busy {self._doing[0] if self._doing else ''} after {patience:.0f} s")
        self._look()

    def _give(self, doing: str, call: Callable[[], None]) -> None:
        self._look()
        if not self.off:
            self._calls.put((doing, call))

    def _look(self) -> None:
        """Say what is new: where the run is shown, and what has gone wrong."""
        if self.off:
            return
        if self._tell_where and self._identity and self.backend.where:
            self._tell_where = False
            self._say(self.backend.where)
        if self._failure is not None:
            doing, error = self._failure
            self._give_up(f"failed {doing} ({type(error).__name__}: {shown(error, str)})")
        elif (busy := self._doing) and time.monotonic() - busy[1] > PATIENCE:
            self._give_up(f"has not returned {busy[0]} for {PATIENCE:.0f} s")

    def _give_up(self, why: str) -> None:
        self.off = True
        self._say(f"{why}; the run continues without it")

    def _say(self, text: str) -> None:
        print(one_line(f"--track {self.name}: {text}"), file=sys.stderr, flush=True)

    def _work(self) -> None:
        """Do the calls until there are no more, or one fails."""
        while (given := self._calls.get()) is not None:
            doing, call = given
            self._doing = (doing, time.monotonic())
            try:
                call()
            except (Exception, SystemExit) as error:  # a library must not end the thread in silence
                self._failure = (doing, error)
                return
            self._doing = None
