"""Locks on open files, as the system has them: POSIX or Windows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

OPENED = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NOINHERIT", 0)
"""Flags of a file that is opened to be locked: not for children, and not through a link."""

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    FAR = 2**30
    """The byte that is locked: far behind the text, which others can read then."""

    def take(descriptor: int) -> None:
        """Lock an open file until it is closed. Raises ``BlockingIOError`` where another process has done so."""
        os.lseek(descriptor, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)

    def remove(path: Path, descriptor: int) -> None:
        """Close a locked file, and then remove it, which Windows refuses for an open one."""
        os.close(descriptor)
        with contextlib.suppress(PermissionError):  # another process has opened it since
            path.unlink(missing_ok=True)

else:

    def take(descriptor: int) -> None:
        """Lock an open file until it is closed. Raises ``BlockingIOError`` where another process has done so."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(path: Path, descriptor: int) -> None:
        """Remove a locked file before it is closed, so that no other process can lock it in between."""
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
