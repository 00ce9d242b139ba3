"""A lock on a directory that dies with its owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from tether.errors import RunError
from tether.runtime.files import writing

NAME = ".lock"


class Lock:
    """One process at a time in a directory. The kernel drops the lock with the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock, or raise :class:`RunError` that names who has it."""
        self.path = directory / NAME
        while True:
            with writing(self.path):
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self.descriptor, 32).decode(errors="replace").strip()
                os.close(self.descriptor)
                raise RunError(
                    f"{directory}: process {owner} is at work here; wait until it ends, or stop it"
                ) from None
            if self._in_place():
                break
            os.close(self.descriptor)  # another process has removed the file between our two calls
        try:
            with writing(self.path):
                os.ftruncate(self.descriptor, 0)
                os.write(self.descriptor, f"{os.getpid()}\n".encode())
        except RunError:
            self.release()
            raise

    def _in_place(self) -> bool:
        """Whether the file that is locked is the one with the name."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock up, and remove its file."""
        with contextlib.suppress(OSError):  # of a disk that is read-only by now; a file without an owner locks nothing
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
