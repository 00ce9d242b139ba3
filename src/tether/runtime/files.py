"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tether.errors import RunError


def require_writable(path: Path) -> None:
    """Raise :class:`RunError` unless ``path`` and its missing parents can be created."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise RunError(f"cannot be created, because {parent} is a file", where=path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"cannot be created, because {parent} cannot be written to", where=path)


def require_file(path: Path) -> None:
    """Raise :class:`RunError` unless ``path`` can be written as a file."""
    if path.is_dir():
        raise RunError("is a directory", where=path, hint="--out must name a file")
    if not path.parent.is_dir():
        raise RunError(f"the directory {path.parent} does not exist", where=path)
    require_writable(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise :class:`RunError` where the block fails because the disk is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot be written ({reason})", where=path) from error


@contextlib.contextmanager
def atomic_write(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a directory to; it is renamed to ``target`` when the block ends.

    Where the block raises, it is removed and ``target`` is unchanged. With ``durable`` it is on the disk before the
    rename, so that even a loss of power leaves no name without its contents.
    """
    partial = target.with_name(f".{target.name}.partial")
    with writing(target):
        remove(partial)
        try:
            yield partial
            if durable:
                sync(partial)
            if target.is_dir():
                remove(target)
            os.replace(partial, target)
            if durable:
                sync_one(target.parent)
        finally:
            remove(partial)


def sync(path: Path) -> None:
    """Wait until a file, or a directory with all that is in it, is on the disk."""
    for inner in [*path.rglob("*"), path]:
        sync_one(inner)


def sync_one(path: Path) -> None:
    """Wait until one file, or the list of names in one directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if there is one; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
