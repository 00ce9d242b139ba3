"""How the files of a run directory are read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tether.errors import RunError


@contextlib.contextmanager
def reading(file: Path, *, writer: str = "tether") -> Iterator[None]:
    """What ``file`` holds that its ``writer`` does not write there is a :class:`RunError` that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise RunError(f"not as {writer} writes it ({type(error).__name__}: {error})", where=file) from error


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not file.is_file():
        return {}
    with reading(file):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it holds one JSON object")
        return found


def json_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file."""
    if not file.is_file():
        return []
    with reading(file):  # as bytes: in text, characters that a completion may hold end a line too
        found = [json.loads(line) for line in file.read_bytes().splitlines()]
        if not all(isinstance(row, dict) for row in found):
            raise TypeError("each of its lines holds one JSON object")
        return found
