"""Questions about texts that may take for ever to answer, asked of a process that is killed at a deadline.

A regular expression can backtrack without end, and ``9^{9^{9^{9}}}`` can be computed without end: in compiled code that
holds the interpreter's lock, which neither a signal nor a thread interrupts. What a model writes must not be able to
stop a run in this way, so such questions are answered by :mod:`tether.rewards.grader_main` in another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from tether.errors import RewardError
from tether.untrusted import shown

DEADLINE = 5.0
"""Seconds for an answer, unless the reward says otherwise."""
SOON = 0.25
"""Seconds after which another process is started, in case this one has to be killed."""
STARTING = 120.0
"""Seconds for the process to import what it needs."""
PROGRAM = Path(__file__).with_name("grader_main.py")
KEPT = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "HOME", "APPDATA", "SYSTEMROOT", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
)  # fmt: skip
"""What the process sees of the environment: by which it finds Python and its packages, and no secret."""

Process = subprocess.Popen[bytes]


class Grader:
    """Answers to questions of one kind, which ``task`` names (:func:`tether.rewards.grader_main.answerer`).

    The process is started with the first question and ends with this one. It is a fresh Python, not a fork, so it
    holds none of this process's memory, threads or devices. Threads may share a grader; one is served at a time.
    """

    def __init__(self, rule: str, *task: str, deadline: float = DEADLINE) -> None:
        self.rule, self.task, self.deadline = rule, task, deadline
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._spare: Process | None = None
        self._alive: list[Process] = []
        weakref.finalize(self, _end, self._alive)

    def ask(self, *question: str) -> bool | None:
        """The answer, or None where there was none within the deadline.

        It takes no longer than the deadline even then: a process to take the place of the one that is killed is started
        where an answer has not come soon. Raises :class:`RewardError` where the process fails for another reason.
        """
        with self._lock:
            if self._process is None:
                self._process = self._ready()
            process = self._process
            try:
                _say(process, question)
                line = self._line(process, self.deadline, replace=True)
                return None if line is None else bool(self._value(process, line, f" on {shown(question[-1])}"))
            except BaseException:  # a failure, or a request to stop, after which a reply would be left over
                self._drop(process)
                raise

    def _ready(self) -> Process:
        """The spare process, or else a new one, once it is ready for questions."""
        process, self._spare = self._spare or self._start(), None
        try:
            line = self._line(process, STARTING)
            if line is None:
                raise RewardError(f"reward {self.rule!r}: its process did not start within {STARTING:g} s")
            self._value(process, line)
        except BaseException:
            self._drop(process)
            raise
        return process

    def _start(self) -> Process:
        try:
            process = subprocess.Popen(  # noqa: S603 - this Python and our program
                [sys.executable, "-P", str(PROGRAM), str(self.deadline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in KEPT if name in os.environ},
                start_new_session=True,  # Ctrl-C is for the run, which ends its graders
            )
        except OSError as error:
            raise RewardError(f"reward {self.rule!r}: its process cannot be started ({error})") from None
        self._alive.append(process)
        _say(process, self.task)
        return process

    def _line(self, process: Process, seconds: float, *, replace: bool = False) -> str | None:
        """The next line of ``process``, empty where it has ended; None, and the process ended, where none comes in
        time. With ``replace`` there is a spare one then."""
        assert process.stdout is not None
        over, expired = threading.Event(), threading.Event()
        soon = min(SOON, seconds / 2)

        def watch() -> None:
            if over.wait(soon):
                return
            if replace and self._spare is None:
                with contextlib.suppress(RewardError):  # the next question starts one, or says why that fails
                    self._spare = self._start()
            if not over.wait(seconds - soon):
                expired.set()
                process.kill()

        watcher = threading.Thread(target=watch, name="tether-grader-deadline", daemon=True)
        watcher.start()
        try:
            line = process.stdout.readline().decode()
        finally:
            over.set()
            watcher.join()
        if not expired.is_set():
            return line
        self._drop(process)
        return line or None

    def _value(self, process: Process, line: str, about: str = "") -> object:
        """The value in a reply. Raises :class:`RewardError` where it is a failure, or there is none."""
        reply = json.loads(line) if line else {"error": f"it ended with exit status {process.wait()}"}
        if "error" in reply:
            raise RewardError(f"reward {self.rule!r}: its process failed{about} ({shown(reply['error'], str)})")
        return reply["value"]

    def _drop(self, process: Process) -> None:
        if self._process is process:
            self._process = None
        if process in self._alive:
            self._alive.remove(process)
            _end([process])


def _say(process: Process, texts: tuple[str, ...]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which its next line says
        process.stdin.write(json.dumps(texts).encode() + b"\n")
        process.stdin.flush()


def _end(processes: list[Process]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what is left to be written to a process that has ended
                pipe.close()
    processes.clear()
