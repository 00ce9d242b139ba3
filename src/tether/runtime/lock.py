"""A lock on a directory that ends with its owner."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from tether.errors import RunError
from tether.runtime import locking
from tether.runtime.files import writing

NAME = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What file systems answer that have no locks: some over a network, unless they are mounted with them."""


class Lock:
    """One process at a time in a directory. The kernel releases the lock when the process ends, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises :class:`RunError` that names the process that holds it, or says that the file system
        has no locks."""
        self.path = directory / NAME
        while True:
            with writing(self.path):
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | locking.OPENED, 0o644)
            try:
                locking.take(self.descriptor)
            except BlockingIOError:
                owner = os.read(self.descriptor, 32).decode(errors="replace").strip()
                os.close(self.descriptor)
                raise RunError(
                    f"in use by process {owner}", where=directory, hint="wait until it ends, or stop it"
                ) from None
            except OSError as error:
                self.release()
                if error.errno not in NO_LOCKS:
                    raise RunError(f"cannot be locked ({error.strerror})", where=directory) from error
                raise RunError(
                    f"the file system has no locks ({error.strerror}), so two processes could write to one run",
                    where=directory,
                    hint="use a run directory on another file system, or mount this one with locks",
                ) from error
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
            locking.remove(self.path, self.descriptor)
