"""Requests to stop, from a signal or a clock, and where they take effect.

Training stops between two micro-batches or two decoding steps, where its state is consistent: that code calls
:func:`check`. Foreign code that does not touch the state, such as a reward function, runs under :func:`at_once`, where
a request takes effect wherever the code is, and optionally under a :func:`deadline`. A rank that shares a step with
others must not leave it alone, so there a request waits until all ranks agree on it between two steps (:func:`asked`).

Requests belong to the process, as its signals do. Outside :func:`heeded` there are none: there SIGINT is Python's
KeyboardInterrupt, and what would be left half-done by it runs under :func:`at_safe_points`.
"""

from __future__ import annotations

import _thread
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
"""Interrupted, and ``tether resume`` continues; EX_TEMPFAIL of sysexits.h."""
REMINDER = 1.0
"""Seconds after which a clock that has run out signals again."""
WAKE: signal.Signals = getattr(signal, "SIGURG", None) or signal.SIGBREAK  # type: ignore[attr-defined, unused-ignore]
"""Tells the main thread that a clock has run out. SIGURG is ignored unless handled, and neither reward functions nor
schedulers use it. Windows lacks it; there it is SIGBREAK, which Ctrl+Break sends: that does nothing in a run."""


class Interrupted(BaseException):
    """A request to stop takes effect. Like KeyboardInterrupt it is no ``Exception``, so that handlers of errors let it
    pass.
    """

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it."""
        return [f"{type(self).__name__}: {self}"]


class DeadlineError(BaseException):
    """A call ran past its deadline; no ``Exception`` either, so that the call cannot swallow it by mistake."""


@dataclass
class Requests:
    """What has been asked for."""

    stop: str = ""
    """Why to stop; empty without a request."""
    within_steps: bool = True
    """Whether a request may take effect within a step."""
    at_once: bool = False
    """Whether a request takes effect wherever the code is."""
    expired: bool = False
    """Whether the deadline of the call that is running has passed."""
    survivable: bool = False
    """Whether a second SIGINT leaves the process alive."""


_asked = Requests()


@dataclass
class HeldBack:
    """A SIGINT outside of :func:`heeded` that waits for a safe point."""

    handler: Callable[[int, FrameType | None], object] = signal.default_int_handler
    """Who is told of it then: Python's handler, which raises KeyboardInterrupt, or the one of a notebook's kernel."""
    holding: bool = False
    """Whether one that comes has to wait."""
    waiting: bool = False
    """Whether one waits."""

    def deliver(self) -> None:
        """Let the signal that waits, if there is one, take effect here. It is the main thread's, as all signals are."""
        if self.waiting and threading.current_thread() is threading.main_thread():
            self.waiting = False
            self.handler(signal.SIGINT, None)


_interrupt = HeldBack()


def check() -> None:
    """Raise :class:`Interrupted` if there is a request to stop that may take effect within a step, and
    KeyboardInterrupt if one waits (:func:`at_safe_points`)."""
    _interrupt.deliver()
    if _asked.stop and _asked.within_steps:
        raise Interrupted(_asked.stop)


def asked() -> str:
    """Why to stop, or "" without a request."""
    return _asked.stop


def stoppable(parts: Iterable[T]) -> Iterator[T]:
    """``parts``, with a :func:`check` before each."""
    for part in parts:
        check()
        yield part


@contextlib.contextmanager
def at_safe_points() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt where :func:`check` is called, in a block :func:`anywhere`, or
    when the outermost block ends, and not between any two instructions, such as between an optimizer step and its
    record.

    Without effect outside of the main thread, where no signal arrives, and where SIGINT does not run a Python function
    or is a request to stop already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is _on_interrupt:
        before, _interrupt.holding = _interrupt.holding, True
        try:
            yield
        finally:
            _interrupt.holding = before
            if not before:
                _interrupt.deliver()
    elif handler is _on_signal or not callable(handler):
        yield
    else:
        _interrupt.handler, _interrupt.holding, _interrupt.waiting = handler, True, False
        signal.signal(signal.SIGINT, _on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            _interrupt.deliver()


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Within the block, inside of :func:`at_safe_points`, SIGINT takes effect wherever the code is: for foreign code,
    which may take long and does not touch the state."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _interrupt.holding = _interrupt.holding, False
    try:
        _interrupt.deliver()
        yield
    finally:
        _interrupt.holding = before


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within the block a request to stop raises :class:`Interrupted` wherever the code is."""
    _asked.at_once = _asked.within_steps
    try:
        check()
        yield
    finally:
        _asked.at_once = False


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise :class:`DeadlineError` in the block once it has run for ``seconds``; None sets no deadline.

    Sleep, waiting for a socket and Python code end at once, compiled code when it returns to Python. A deadline works
    in the main thread only; elsewhere it raises :class:`ConfigError`.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("a deadline works in the main thread only", hint="call from there, or set none")

    def expired() -> None:
        _asked.expired = True

    _asked.expired = False
    with _handled({WAKE: _on_wake}), _after(seconds, expired):
        try:
            yield
        finally:
            _asked.expired = False


@contextlib.contextmanager
def survivable() -> Iterator[None]:
    """Within the block a second SIGINT raises KeyboardInterrupt wherever the code is, and does not end the process: it
    is a person's own, such as a notebook's kernel."""
    _asked.survivable = True
    try:
        yield
    finally:
        _asked.survivable = False


@contextlib.contextmanager
def heeded(stop_after: float | None = None, *, within_steps: bool = True) -> Iterator[None]:
    """Within the block, take SIGTERM, SIGINT and the end of ``stop_after`` seconds as requests to stop.

    A second signal ends the process at once with code 75, which loses nothing but the work since the last checkpoint:
    files appear whole or not at all. ``within_steps`` is False where the process shares its steps with others. Outside
    the main thread the block has no effect, because signals go to the main thread.
    """

    def time_is_up() -> None:
        _asked.stop = _asked.stop or "its time limit"

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.within_steps = within_steps
    with (
        _handled({signal.SIGTERM: _on_signal, signal.SIGINT: _on_signal, WAKE: _on_wake}),
        _after(stop_after, time_is_up),
    ):
        try:
            yield
        finally:
            _asked.stop, _asked.within_steps = "", True


@contextlib.contextmanager
def _after(seconds: float | None, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` and wake the main thread if the block takes longer than ``seconds``; then wake it repeatedly,
    because running code may catch the first exception and wait again, as a pool does for its threads.
    """

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            act()
            _wake(main)
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
            watcher.join()  # so that it cannot wake a later block


def _wake(thread: int) -> None:
    """Have the main ``thread`` handle :data:`WAKE`: at once, or on Windows when it next runs Python code, which a
    sleeping call, or one that waits for a socket, does not."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, WAKE)
    else:
        _thread.interrupt_main(WAKE)


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    """Signal handlers for the duration of the block."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _asked.stop.startswith("SIG"):
        if _asked.survivable and number == signal.SIGINT:
            raise KeyboardInterrupt
        _leave(name)
    _asked.stop = name
    if _asked.at_once:
        raise Interrupted(name)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _interrupt.holding:
        _interrupt.waiting = True
    else:
        _interrupt.handler(number, frame)


def _on_wake(_: int, __: FrameType | None) -> None:
    if _asked.stop and _asked.at_once:
        raise Interrupted(_asked.stop)
    if _asked.expired:
        raise DeadlineError


def _leave(name: str) -> None:
    """End the process at once."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    os.write(2, f"{show_cursor}\ntether: a second signal ({name}), so it ends at once\n".encode())
    os._exit(EXIT_CODE)
