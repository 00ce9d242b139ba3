"""Requests to stop, from a signal or a clock, and where they are heeded.

Training stops between two micro-batches or two decoding steps, where its state is whole: that code asks
:func:`check`. Code that is not ours and does not touch the state, such as a reward function, runs under
:func:`at_once`, where a request takes effect wherever the code is, and perhaps under a :func:`deadline`.

All of this is the process's, as its signals are. Outside :func:`heeded` nothing is ever asked to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from tether.errors import ConfigError

T = TypeVar("T")

EXIT_CODE = 75
"""Interrupted, and ``tether resume`` goes on; EX_TEMPFAIL of sysexits.h."""
REMINDER = 1.0
"""Seconds after which a clock that has run out says so again."""
WAKE = signal.SIGURG
"""Tells the main thread that a clock has run out. It is ignored unless handled, and neither reward functions nor
schedulers have a use for it."""


class Interrupted(BaseException):
    """A request to stop takes effect. Like KeyboardInterrupt it is no ``Exception``, so that no handler of errors
    takes it for one.
    """


class DeadlineError(BaseException):
    """A call went on past its deadline; no ``Exception`` either, so that the call cannot swallow it by mistake."""


@dataclass
class Requests:
    """What has been asked for."""

    stop: str = ""
    """Why to stop; empty as long as nobody has asked."""
    at_once: bool = False
    """Whether a request takes effect wherever the code is."""
    expired: bool = False
    """Whether the deadline of the call that is running has passed."""


_asked = Requests()


def check() -> None:
    """Raise :class:`Interrupted` if somebody has asked to stop."""
    if _asked.stop:
        raise Interrupted(_asked.stop)


def stoppable(parts: Iterable[T]) -> Iterator[T]:
    """``parts``, with a :func:`check` before each."""
    for part in parts:
        check()
        yield part


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within the block a request to stop raises :class:`Interrupted` wherever the code is."""
    _asked.at_once = True
    try:
        check()
        yield
    finally:
        _asked.at_once = False


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise :class:`DeadlineError` in the block once it has run for ``seconds``; None lets it run for ever.

    Sleep, waiting for a socket and Python code are ended; compiled code is, once it returns to Python. Only the main
    thread can keep a deadline: elsewhere one raises :class:`ConfigError`.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("a deadline can be kept in the main thread only; call from there, or set none")

    def expired() -> None:
        _asked.expired = True

    _asked.expired = False
    with _handled({WAKE: _on_wake}), _after(seconds, expired):
        try:
            yield
        finally:
            _asked.expired = False


@contextlib.contextmanager
def heeded(stop_after: float | None = None) -> Iterator[None]:
    """Within the block, take SIGTERM, SIGINT and the end of ``stop_after`` seconds as requests to stop.

    A second signal ends the process at once with code 75, which loses nothing but the work since the last checkpoint:
    files appear whole or not at all. In another thread than the main one nothing is heeded: signals are not its own.
    """

    def time_is_up() -> None:
        _asked.stop = _asked.stop or "its time limit"

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with (
        _handled({signal.SIGTERM: _on_signal, signal.SIGINT: _on_signal, WAKE: _on_wake}),
        _after(stop_after, time_is_up),
    ):
        try:
            yield
        finally:
            _asked.stop = ""


@contextlib.contextmanager
def _after(seconds: float | None, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` and wake the main thread if the block takes longer than ``seconds``; and wake it again and again,
    because the first exception may be spent on a wait that the code under way begins anew, such as a pool's for its
    threads.
    """

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            act()
            signal.pthread_kill(main, WAKE)
            wait = REMINDER

    main, over = threading.get_ident(), threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    if seconds is not None:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if seconds is not None:
            watcher.join()  # or it might wake somebody else


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    """Signal handlers for the time of the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _asked.stop.startswith("SIG"):
        _leave(name)
    _asked.stop = name
    if _asked.at_once:
        raise Interrupted(name)


def _on_wake(_: int, __: FrameType | None) -> None:
    if _asked.stop and _asked.at_once:
        raise Interrupted(_asked.stop)
    if _asked.expired:
        raise DeadlineError


def _leave(name: str) -> None:
    """End the process without another thought."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    os.write(2, f"{show_cursor}\ntether: a second signal ({name}), so it ends at once\n".encode())
    os._exit(EXIT_CODE)
