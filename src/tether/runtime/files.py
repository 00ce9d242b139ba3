"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
def whole(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a directory to; it becomes ``target`` once the block is through.

    Where the block raises, nothing is left of it and ``target`` is what it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
