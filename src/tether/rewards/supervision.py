"""Calls of user code: each has a deadline, can be interrupted, and is retried where that is safe.

A call that fails raises :class:`tether.errors.RewardError`; it never counts as a number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from tether import stop_requests
from tether.errors import RewardError
from tether.untrusted import one_line

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try; each later pause is twice the one before, up to the longest."""


def supervised(name: str, call: Callable[[], T], *, deadline: float | None, retries: int, kind: str = "reward") -> T:
    """What ``call`` returns; after a :class:`RewardError` it is retried, up to ``retries`` times.

    ``call`` raises :class:`RewardError` for whatever goes wrong in it, except :class:`Interrupted` and
    :class:`DeadlineError` of :mod:`tether.stop_requests`, which it must let through: the first ends this call too, the
    second is raised ``deadline`` seconds after a try began and counts as a failure. Raises the error of the last try.
    ``kind`` says in errors what ``name`` is.
    """
    wait, tries = FIRST_PAUSE, 1
    while True:
        try:
            return _in_time(name, call, deadline, kind)
        except RewardError as error:
            stop_requests.check()  # the call may have turned a request to stop into an error
            print(again(error, tries, retries, wait), file=sys.stderr, flush=True)
        tries += 1
        pause(wait)
        wait = next_pause(wait)


def again(error: RewardError, tries: int, retries: int, wait: float) -> str:
    """What is said before another try, after the ``error`` of try number ``tries``; raises it where that was the
    last."""
    if tries > retries:
        if retries:
            error.advise(f"tried {tries} times")
        raise error
    return f"tether: {one_line(str(error))}; try {tries + 1} of {retries + 1} in {wait:g} s"


def next_pause(wait: float) -> float:
    """The seconds of the pause after one of ``wait`` seconds."""
    return min(2 * wait, LONGEST_PAUSE)


def late(name: str, deadline: float | None, kind: str = "reward") -> RewardError:
    """The error for a call that runs past its deadline."""
    return RewardError(
        f"{kind} {name!r} did not return within {deadline:g} s", hint="raise --reward-deadline or make it faster"
    )


def pause(seconds: float) -> None:
    """Sleep; a request to stop interrupts it."""
    with stop_requests.at_once():
        time.sleep(seconds)


def _in_time(name: str, call: Callable[[], T], deadline: float | None, kind: str) -> T:
    """What ``call`` returns, unless a request to stop or its deadline ends it first."""
    started = time.monotonic()
    try:
        with stop_requests.at_once(), stop_requests.deadline(deadline):
            returned = call()
        # A bare "except:" in the call swallows both, and what the call then returns is not a reward.
        stop_requests.check()
        if deadline is not None and time.monotonic() - started > deadline:
            raise stop_requests.DeadlineError
    except stop_requests.DeadlineError as error:
        raise late(name, deadline, kind) from error
    return returned
