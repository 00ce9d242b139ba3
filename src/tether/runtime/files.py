"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tether.errors import RunError


def require_writable(path: Path) -> None:
    """Raise unless ``path``, or what has to be made on the way to it, can be made."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise RunError(f"{path}: cannot be made, because {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"{path}: cannot be made, because {parent} cannot be written to")


def require_file(path: Path) -> None:
    """Raise unless ``path`` can be written as a file."""
    if path.is_dir():
        raise RunError(f"{path}: is a directory; --out must name a file")
    if not path.parent.is_dir():
        raise RunError(f"{path}: the directory {path.parent} does not exist")
    require_writable(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line of a disk that is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{path}: cannot be written ({reason})") from error


@contextlib.contextmanager
def whole(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a directory to; it becomes ``target`` once the block is through.

    Where the block raises, nothing is left of it and ``target`` is what it was. With ``durable`` it is on the disk
    before it takes its name, so that not even a loss of power leaves a name without its contents.
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
