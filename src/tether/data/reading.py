"""Rows from a local file, a local data-set directory or a hub id, each with the place it came from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import DataError


@dataclass(frozen=True)
class Row:
    """One data row. ``where`` names it for a person: ``pairs.jsonl:17`` (lines count from 1)."""

    where: str
    values: dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """All rows of ``source``: ``*.jsonl``, ``*.json`` (one object a line), either gzipped, ``*.parquet``, a directory
    or a hub id that ``datasets`` can load (``name`` or ``name:split``, the split ``train`` unless given).

    Raises :class:`DataError` that names the file, and the line where there is one.
    """
    path = Path(source)
    if path.is_dir() or (not path.exists() and _looks_like_hub_id(source)):
        rows = list(_read_dataset(source))
    elif not path.exists():
        raise DataError(
            f"{source}: no such file (a local path ends in .jsonl, .json.gz or .parquet; a hub id is owner/name)"
        )
    elif path.name.endswith(".parquet"):
        rows = list(_read_parquet(path))
    elif path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        rows = list(_read_json_lines(path))
    else:
        raise DataError(f"{source}: unknown format; give .jsonl, .json, either with .gz, or .parquet")
    if not rows:
        raise DataError(f"{source}: holds no rows")
    return rows


def _looks_like_hub_id(source: str) -> bool:
    name = source.split(":")[0]
    return name.count("/") <= 1 and not source.startswith((".", "/", "~")) and "." not in Path(name).suffix


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})") from None
                if not isinstance(values, dict):
                    raise DataError(f"{path}:{number}: a row must be a JSON object, found {type(values).__name__}")
                yield Row(f"{path}:{number}", values)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: not valid UTF-8 ({error.reason})") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(f"{path}:row {number}", values)


def _read_dataset(source: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading a data set needs the extra: pip install 'tether-rlhf[hub]'") from None
    name, _, split = source.partition(":")
    split = split or "train"
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types; all of them mean the same to the caller
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: no such file, and not loadable as a data set ({reason})") from error
    for number, values in enumerate(dataset, 1):
        yield Row(f"{source}:row {number}", dict(values))
