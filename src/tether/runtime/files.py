"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from tether.errors import RunError

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
"""Names of open descriptors of this process, beside ``/dev/fd/N``."""
LONGEST_NAME = 240
"""Bytes of a name that still leave room for what :func:`atomic_write` puts around it."""


def require_writable(path: Path) -> None:
    """Raise :class:`RunError` unless ``path`` and its missing parents can be created."""
    parent = next((p for p in path.absolute().parents if os.path.lexists(p)), Path(path.absolute().anchor))
    if not os.path.isdir(parent):
        raise RunError(f"cannot be created, because {parent} is a file", where=path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"cannot be created, because {parent} cannot be written to", where=path)


def require_file(path: Path) -> None:
    """Raise :class:`RunError` unless :func:`write_output` can write to ``path``."""
    hint = "--out must name a file"
    if os.path.isdir(path):
        raise RunError("is a directory", where=path, hint=hint)
    if kind := unwritable_kind(path):
        raise RunError(f"is {kind}, which is not written to", where=path, hint=hint)
    if is_stream(path):
        if _descriptor(path) is None and not os.access(path, os.W_OK):
            raise RunError("cannot be written to", where=path)
        return
    real = Path(os.path.realpath(path))
    if os.path.islink(real):
        raise RunError("is a link that leads back to itself", where=path, hint=hint)
    if not os.path.isdir(real.parent):
        raise RunError(f"the directory {real.parent} does not exist", where=path)
    require_writable(real)


def unwritable_kind(path: Path) -> str:
    """What ``path`` is if nothing can or should be written to it: a socket, or a disk as a whole; else ""."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    return "a socket" if stat.S_ISSOCK(mode) else "a block device" if stat.S_ISBLK(mode) else ""


def is_stream(path: Path) -> bool:
    """Whether ``path`` is written to by opening it: a terminal, a pipe, a device, an open descriptor."""
    return _descriptor(path) is not None or (os.path.exists(path) and not os.path.isfile(path))


def _descriptor(path: Path) -> int | None:
    """The number of the open descriptor that ``path`` names, which may be open for appending to a regular file."""
    name = os.path.abspath(path)
    numbered = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,6})", name)
    return int(numbered[1]) if numbered else STREAMS.get(name)


def write_output(path: Path, content: bytes) -> None:
    """Write ``content`` to a path that a person named, and never replace anything but a regular file.

    A regular file, or none yet, is replaced whole, behind a link where the path is one, and keeps its permissions.
    A terminal, a pipe or a device is opened and written to. Raises :class:`RunError`.
    """
    require_file(path)
    if is_stream(path):
        with writing(path), _opened(path) as out:
            out.write(content)
        return
    real = Path(os.path.realpath(path))
    with atomic_write(real, named=path) as partial:
        partial.write_bytes(content)
        if real.exists():
            shutil.copymode(real, partial)


def _opened(path: Path) -> BinaryIO:
    """What ``path`` names, open for writing; it is neither created nor cut."""
    number = _descriptor(path)
    return os.fdopen(os.open(path, os.O_WRONLY) if number is None else os.dup(number), "wb")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise :class:`RunError` where the block fails because the disk is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot be written ({reason})", where=path) from error


@contextlib.contextmanager
def atomic_write(target: Path, *, durable: bool = False, named: Path | None = None) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a directory to; it is renamed to ``target`` when the block ends.

    Where the block raises, it is removed and ``target`` is unchanged. With ``durable`` it is on the disk before the
    rename, so that even a loss of power leaves no name without its contents. A directory takes the place of another
    one, a file does not. Errors call the target ``named``, where that is given.
    """
    short = os.fsdecode(os.fsencode(target.name)[:LONGEST_NAME])
    partial = target.with_name(f".{short}.partial")
    with writing(named or target):
        remove(partial)
        try:
            yield partial
            if durable:
                sync(partial)
            if target.is_dir() and partial.is_dir():
                remove(target)
            os.replace(partial, target)
            if durable:
                sync_one(target.parent)
        finally:
            remove(partial)


def write_table(path: Path, table: Any) -> None:
    """Write a ``pyarrow.Table`` as Parquet, or replace it as a whole."""
    import pyarrow.parquet

    with atomic_write(path) as partial, partial.open("wb") as out:  # pyarrow would take some names for URLs
        pyarrow.parquet.write_table(table, out, compression="zstd")


def sync(path: Path) -> None:
    """Wait until a file, or a directory with all that is in it, is on the disk."""
    for inner in [*path.rglob("*"), path]:
        sync_one(inner)


NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What file systems answer that cannot flush a directory: some of those in user space or over a network."""


def sync_one(path: Path) -> None:
    """Wait until one file, or the list of names in one directory, is on the disk.

    Where the system cannot flush a directory, its names reach the disk when the system writes them.
    """
    directory = path.is_dir()
    if directory and os.name == "nt":  # Windows opens no directory
        return
    descriptor = os.open(path, os.O_RDONLY if directory or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not directory or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if there is one; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
