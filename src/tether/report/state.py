"""Whether a run is finished, running, was stopped or was interrupted."""

from __future__ import annotations

import os
from pathlib import Path

from tether.report.view import RunView
from tether.runtime import lock, locking


def state_of(path: Path, view: RunView) -> str:
    """Whether a run is finished, running, was stopped or was interrupted, from the files that it leaves."""
    if is_locked(path):
        return "running"
    if view.summary:
        ended = view.summary.get("ended")
        return f"finished: {ended}" if ended else "finished"
    if view.alarms and view.alarms[-1][1].stop:
        return f"stopped by {view.alarms[-1][1].monitor}"
    return "interrupted"


def is_locked(path: Path) -> bool:
    """Whether a process works in the directory. The lock is tried only where the process that is named in its file is
    alive, and released at once."""
    file = path / lock.NAME
    try:
        owner = int(file.read_text().strip())
        os.kill(owner, 0)
    except PermissionError:
        return True  # a process of another person
    except (OSError, ValueError, OverflowError):
        return False
    try:
        descriptor = os.open(file, os.O_RDWR | locking.OPENED)
    except OSError:
        return False
    try:
        locking.take(descriptor)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(descriptor)
    return False


def unfinished(path: Path, view: RunView) -> str:
    """How far a run has come that is not finished, and how to go on: ``interrupted at step 1 of 20 (tether resume
    DIR)``; "" of a finished one."""
    if view.summary:
        return ""
    state = state_of(path, view)
    of = "" if view.total is None else f" of {view.total}"
    resume = "" if state == "running" else f" (tether resume {path})"
    return f"{state} at step {view.step}{of}{resume}"
