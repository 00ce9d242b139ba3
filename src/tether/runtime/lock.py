"""A lock on a directory that ends with its owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from tether.errors import RunError
from tether.runtime.files import writing

NAME = ".lock"


class Lock:
    """One process at a time in a directory. The kernel releases the lock when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises :class:`RunError` that names the process that holds it."""
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
                    f"in use by process {owner}", where=directory, hint="wait until it ends, or stop it"
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
        """Whether the locked file still has the name."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock and remove its file."""
        with contextlib.suppress(OSError):  # where the disk is now read-only; a file without an owner locks nothing
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
