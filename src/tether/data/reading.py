"""Rows from a local file, a local data-set directory, a hub id or memory, each with the place it came from."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tether.data.memory import Rows, Source
from tether.errors import DataError
from tether.hub import settle_for_the_cache_when_offline

DEEPEST = 100
"""How deep the lists and objects of a row may be nested."""


class RowError(DataError):
    """What is wrong with one row; ``kind`` is what such rows are counted under."""

    def __init__(self, kind: str, reason: str, *, hint: str = "") -> None:
        super().__init__(reason, hint=hint)
        self.kind = kind
        self.args = kind, reason  # copy and pickle call __init__ with them


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is; as text ``pairs.jsonl:17`` or ``pairs.parquet:row 17``. ``number`` counts from 1."""

    source: str
    number: int
    unit: Literal["line", "row"]

    def __str__(self) -> str:
        return f"{self.source}:{self.number}" if self.unit == "line" else f"{self.source}:row {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One data row."""

    where: Place
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: ``content`` is its columns, or its raw text where it could not be read."""

    where: Place
    kind: str
    reason: str
    content: dict[str, Any] | str


def read_rows(source: Source) -> list[Row | BadRow]:
    """All rows of ``source``: those in memory, or of ``*.jsonl``, ``*.ndjson`` or ``*.json`` (one object per line; in
    ``*.json`` also one array of objects), each also gzipped, ``*.parquet``, or a directory or hub id that ``datasets``
    can load. Upper case is the same.

    A data set is ``name``, ``name:split`` (``train`` unless given; ``train[:1000]`` works) or ``name:subset:split``.
    A row that is not valid UTF-8 or not one JSON object is a :class:`BadRow`. Raises :class:`DataError` where the whole
    source is missing, unreadable or empty.
    """
    rows = _read_memory(source) if isinstance(source, Rows) else _read_stored(source)
    if not rows:
        raise DataError("holds no rows", where=source)
    return rows


def _read_memory(source: Rows) -> list[Row | BadRow]:
    rows: list[Row | BadRow] = []
    for number, values in enumerate(source.values, 1):
        where = Place(source.name, number, "row")
        if isinstance(values, Mapping) and all(isinstance(name, str) for name in values):
            rows.append(_as_row(where, dict(values), may_be_deep=True, may_be_torn=True))
        else:
            found = "a column that no text names" if isinstance(values, Mapping) else type(values).__name__
            rows.append(BadRow(where, "wrong type", f"a row is a dict of columns, found {found}", repr(values)[:200]))
    return rows


def _as_row(where: Place, values: Any, may_be_deep: bool, may_be_torn: bool) -> Row | BadRow:
    try:
        return Row(where, _checked(values, may_be_deep, may_be_torn))
    except RowError as error:
        return BadRow(where, error.kind, str(error), _as_text(values))


def _read_stored(source: str) -> list[Row | BadRow]:
    """The rows of a file, a directory or a hub id."""
    path, name = Path(source), Path(source).name.lower()
    if dataset := _dataset(source):
        rows: list[Row | BadRow] = list(_read_dataset(source, *dataset))
    elif not path.exists():
        raise DataError(
            "no such file (a local path ends in .jsonl, .json.gz or .parquet; a hub id is owner/name)", where=source
        )
    elif name.endswith(".parquet"):
        rows = list(_read_parquet(path))
    elif name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json")):
        rows = list(_read_json(path, may_be_array=name.removesuffix(".gz").endswith(".json")))
    else:
        raise DataError(
            "unknown format", where=source, hint="give .jsonl, .ndjson or .json, each also with .gz, or .parquet"
        )
    return rows


_DATASET = re.compile(r"(?P<name>[^:]+?)(:(?P<subset>[^:\[]+))??(:(?P<split>[^:\[]+(\[.*\])?))?")
_FILE_SUFFIXES = {".jsonl", ".ndjson", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".zip", ".arrow"}


def _dataset(source: str) -> tuple[str, str | None, str | None] | None:
    """``(name, subset, split)`` of a directory or of something in the form of a hub id; None for a file. Subset and
    split are None where ``source`` does not name them."""
    if Path(source).is_dir():
        return source, None, None
    parts = _DATASET.fullmatch(source)
    if parts is None or Path(source).exists():
        return None
    name = parts["name"]
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).is_dir() or (hub_id and Path(name).suffix.lower() not in _FILE_SUFFIXES):
        return name, parts["subset"], parts["split"]
    return None


def _read_json(path: Path, *, may_be_array: bool) -> Iterator[Row | BadRow]:
    """One object per line or, if that ``may_be``, one array of objects that begins on the first line."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:  # bytes, so that a line that is not UTF-8 can be named
            for number, line in enumerate(lines, 1):
                if may_be_array and line.strip():
                    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                        yield from _read_array(line + lines.read(), path)
                        return
                    may_be_array = False
                if line.strip():
                    yield _read_line(line, Place(str(path), number, "line"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read ({error})", where=path) from None


def _read_array(content: bytes, path: Path) -> Iterator[Row | BadRow]:
    """The elements of an array."""
    try:
        elements = _parse_json(content)
    except RowError as error:
        raise DataError(f"begins as an array of rows and is {error.args[1]}", where=path) from None
    if not isinstance(elements, list):
        raise DataError("begins as an array of rows and is none", where=path)
    doubts = _doubts(content)
    for number, values in enumerate(elements, 1):
        where = Place(str(path), number, "row")
        yield _as_row(where, values, *doubts)


def _read_line(line: bytes, where: Place) -> Row | BadRow:
    try:
        return Row(where, _parse_line(line))
    except RowError as error:
        return BadRow(where, error.kind, str(error), line.decode("utf-8", "backslashreplace").strip())


def _parse_line(line: bytes) -> dict[str, Any]:
    return _checked(_parse_json(line.rstrip()), *_doubts(line))


def _doubts(source: bytes) -> tuple[bool, bool]:
    """Whether JSON may be nested too deep, and whether it may hold an unpaired surrogate, which in UTF-8 it can only
    spell as an escape."""
    return source.count(b"[") + source.count(b"{") > DEEPEST, b"\\u" in source


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError("not valid UTF-8", f"not valid UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise RowError(
            "not valid JSON",
            f"not valid JSON ({error.msg} at {f'line {error.lineno}, ' * (error.lineno > 1)}column {error.colno})",
            hint="a row is one JSON object on one line",
        ) from None
    except RecursionError:
        raise RowError("nested too deep", f"nested deeper than {DEEPEST} lists and objects") from None
    except ValueError:  # the only valid JSON that Python refuses
        raise RowError("not valid JSON", "holds an integer of thousands of digits") from None


def _checked(values: Any, may_be_deep: bool, may_be_torn: bool) -> dict[str, Any]:
    """The values of a row. Raises :class:`RowError`."""
    if not isinstance(values, dict):
        raise RowError("wrong type", f"a row is one JSON object on one line, found a {type(values).__name__}")
    if may_be_deep and _deeper(values, DEEPEST):
        raise RowError("nested too deep", f"nested deeper than {DEEPEST} lists and objects")
    if may_be_torn:
        for name, value in values.items():
            if not _encodable([name, value]):
                raise RowError(
                    "unpaired surrogate",
                    f"{ascii(name)[1:-1]} holds an unpaired surrogate, which no tokenizer can read",
                )
    # all rows share the names of their columns
    return {sys.intern(name): value for name, value in values.items()}


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than ``depth`` deep. Walks level by level."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(value: Any) -> str:
    try:
        return json.dumps(value, default=repr)
    except RecursionError:
        return "nested too deep to be shown"


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # pyarrow would take some names for URLs
            table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file ({str(error).splitlines()[0]})", where=path) from None
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError, pyarrow.ArrowException):  # text not in UTF-8, dates outside Python's range
            rows = [_row_of(batch, i) for i in range(batch.num_rows)]
        for values in rows:
            number += 1
            where = Place(str(path), number, "row")
            yield Row(where, values) if isinstance(values, dict) else BadRow(where, *values)


def _row_of(batch: Any, i: int) -> dict[str, Any] | tuple[str, str, str]:
    """Row ``i`` of an Arrow batch, or kind, reason and raw content where Python cannot hold it."""
    import pyarrow

    try:
        values: dict[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return "not valid UTF-8", f"not valid UTF-8 ({error.reason})", ascii(error.object)
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        return "wrong type", f"holds a value that cannot be read ({' '.join(str(error).split())})", ""
    return values


def _saved_dataset(source: str, name: str, subset: str | None, split: str | None) -> Any:
    """A data set written by ``Dataset.save_to_disk``, which is a single split, named or not; or a slice of it."""
    import datasets

    dataset = datasets.load_from_disk(name)
    if split is None and subset is None:
        return dataset
    own = None if dataset.split is None else str(dataset.split)
    if subset is not None or own is None or split is None or split.partition("[")[0] != own:
        found = "without a split" if own is None else f"as the split {own!r}"
        raise DataError(f"the data set was saved {found}", where=source, hint=f"give {name}")
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({own: len(dataset)})
    return dataset.select(range(part.from_, part.to))


def _read_dataset(source: str, name: str, subset: str | None, split: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError("reading a data set needs the extra: pip install 'tether-rlhf[hub]'", where=source) from None
    datasets.disable_progress_bars()
    if not Path(name).exists():
        settle_for_the_cache_when_offline()
    try:
        if (Path(name) / "state.json").is_file():  # written by Dataset.save_to_disk
            dataset = _saved_dataset(source, name, subset, split)
        else:
            dataset = datasets.load_dataset(name, subset, split=split or "train", trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"not loadable as a data set ({reason})", where=source) from error
    rows, number = iter(dataset), 0
    while True:
        number += 1
        try:
            values = dict(next(rows))
        except StopIteration:
            return
        except Exception as error:  # a column that cannot be decoded: an image, audio, text not in UTF-8
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"cannot be read ({reason})", where=Place(source, number, "row")) from error
        yield Row(Place(source, number, "row"), values)
