"""Calls of code that is not ours: each has a deadline, heeds requests to stop, and is tried again where that is safe.

A call that fails ends in a :class:`tether.errors.RewardError`, and never in a number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from tether import interruption
from tether.errors import RewardError
from tether.untrusted import one_line

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try; each later pause is twice the one before, up to the longest."""


def supervised(name: str, call: Callable[[], T], *, deadline: float | None, retries: int) -> T:
    """What ``call`` returns; after a :class:`RewardError` it is tried again, up to ``retries`` times.

    ``call`` turns all that can go wrong in it into a :class:`RewardError`, save :class:`Interrupted` and
    :class:`DeadlineError` of :mod:`tether.interruption`, which it lets through: the first ends this call too, and the
    second, ``deadline`` seconds after a try began, is one more way to fail. Raises the error of the last try.
    """
    wait, tries = FIRST_PAUSE, 1
    while True:
        try:
            return _in_time(name, call, deadline)
        except RewardError as error:
            interruption.check()  # what the call made an error of may have been the request to stop
            if tries > retries:
                if retries:
                    raise RewardError(f"{error}; tried {tries} times") from error
                raise
            what = one_line(str(error))
        tries += 1
        print(f"tether: {what}; try {tries} of {retries + 1} in {wait:g} s", file=sys.stderr, flush=True)
        pause(wait)
        wait = min(2 * wait, LONGEST_PAUSE)


def pause(seconds: float) -> None:
    """Sleep, unless somebody asks to stop."""
    with interruption.at_once():
        time.sleep(seconds)


def _in_time(name: str, call: Callable[[], T], deadline: float | None) -> T:
    """What ``call`` returns, unless a request to stop or its deadline ends it first."""
    started = time.monotonic()
    try:
        with interruption.at_once(), interruption.deadline(deadline):
            returned = call()
        # A bare "except:" in the call swallows both, and what it then returns is no reward.
        interruption.check()
        if deadline is not None and time.monotonic() - started > deadline:
            raise interruption.DeadlineError
    except interruption.DeadlineError as error:
        raise RewardError(
            f"reward {name!r} did not return within {deadline:g} s; raise --reward-deadline or mend it"
        ) from error
    return returned
