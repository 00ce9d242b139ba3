"""Rows from a local file, a local data-set directory or a hub id, each with the place it came from."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import DataError
from tether.hub import settle_for_the_cache_when_offline


@dataclass(frozen=True)
class Row:
    """One data row. ``where`` names it for a person: ``pairs.jsonl:17`` (lines count from 1)."""

    where: str
    values: dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """All rows of ``source``: ``*.jsonl``, ``*.json`` (one object a line), either gzipped, ``*.parquet``, or a
    directory or hub id that ``datasets`` can load.

    A data set is ``name``, ``name:split`` (``train`` unless given; ``train[:1000]`` works) or ``name:subset:split``.
    Raises :class:`DataError` that names the file, and the line where there is one.
    """
    path = Path(source)
    if dataset := _dataset(source):
        rows = list(_read_dataset(source, *dataset))
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


_DATASET = re.compile(r"(?P<name>[^:]+?)(:(?P<subset>[^:\[]+))??(:(?P<split>[^:\[]+(\[.*\])?))?")
_FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".zip", ".arrow"}


def _dataset(source: str) -> tuple[str, str | None, str] | None:
    """``(name, subset, split)`` of a directory or of what has the form of a hub id; None for a file."""
    if Path(source).is_dir():
        return source, None, "train"
    parts = _DATASET.fullmatch(source)
    if parts is None or Path(source).exists():
        return None
    name = parts["name"]
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).is_dir() or (hub_id and Path(name).suffix.lower() not in _FILE_SUFFIXES):
        return name, parts["subset"], parts["split"] or "train"
    return None


def _read_json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:  # bytes, so that a line that is not UTF-8 can be named
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Row(f"{path}:{number}", _parse_line(line, f"{path}:{number}"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); a row is one JSON object on one line"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: a row is one JSON object on one line, found a {type(values).__name__}")
    return values


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(f"{path}:row {number}", values)


def _read_dataset(source: str, name: str, subset: str | None, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading a data set needs the extra: pip install 'tether-rlhf[hub]'") from None
    datasets.disable_progress_bars()
    if not Path(name).exists():
        settle_for_the_cache_when_offline()
    try:
        if (Path(name) / "state.json").is_file():  # written by Dataset.save_to_disk, which has no splits
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises many unrelated types; all of them mean the same to the caller
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: not loadable as a data set ({reason})") from error
    for number, values in enumerate(dataset, 1):
        yield Row(f"{source}:row {number}", dict(values))
