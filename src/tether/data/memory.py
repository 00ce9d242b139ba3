"""Rows given as Python objects: lists, dicts, a pandas DataFrame, a data set of ``datasets``, an Arrow table."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import DataError

LISTED = 6
"""How many names an error lists."""


@dataclass(frozen=True)
class Rows:
    """Rows in memory. Errors and reports name a row by ``name`` and its number."""

    name: str
    values: tuple[Any, ...]
    """One mapping from column to value per row; what is no such mapping is refused where the rows are read."""

    def __str__(self) -> str:
        return self.name

    def __len__(self) -> int:
        return len(self.values)


Source = str | Rows
"""Where rows come from: a file, a directory or a hub id, or memory."""


def source_of(given: Any, *, name: str, text_column: str = "", turns_column: str = "") -> Source:
    """``given`` as a source: a string or a path as the file that it names, anything else as :class:`Rows`.

    ========================================  =========================================
    a list of strings                         ``{text_column: string}`` per row
    a list of lists, each a conversation      ``{turns_column: conversation}`` per row
    a list of dicts                           the rows
    a dict of lists                           columns
    ``pandas.DataFrame``                      rows; NaN and other missing values are None
    ``datasets.Dataset``, Arrow tables        rows
    any other iterable of strings and dicts   as a list
    ========================================  =========================================

    Raises :class:`DataError` for anything else, and where strings are given and there is no ``text_column``.
    """
    if isinstance(given, str | os.PathLike):
        return str(os.fspath(given))
    if isinstance(given, Rows):
        return given
    columns = {str: text_column, list: turns_column, tuple: turns_column}
    rows = []
    for number, item in enumerate(_items(given, name), 1):
        column = next((column for kind, column in columns.items() if isinstance(item, kind)), None)
        if column == "":
            found = type(item).__name__
            raise DataError(f"a row is a dict of columns here, found {found}", where=f"{name}:row {number}")
        rows.append(item if column is None else {column: list(item) if isinstance(item, tuple) else item})
    return Rows(name, tuple(rows))


def _items(given: Any, name: str) -> Iterable[Any]:
    """The rows of any of the forms, in their own types."""
    if _is_frame(given):
        return _of_frame(given, name)
    if callable(to_pylist := getattr(given, "to_pylist", None)):  # an Arrow table
        return list(to_pylist())
    if isinstance(given, Mapping):
        return _of_columns(given, name)
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise DataError(
            f"found {type(given).__name__}, from which no rows can be read",
            where=name,
            hint="give a file or hub id, a list of strings or dicts, a dict of lists, a DataFrame or a Dataset",
        )
    return given


def _of_columns(columns: Mapping[Any, Any], name: str) -> Iterator[dict[str, Any]]:
    """The rows of a dict of lists."""
    wrong = [
        key for key, value in columns.items() if isinstance(value, str | Mapping) or not isinstance(value, Iterable)
    ]
    splits = [key for key, value in columns.items() if hasattr(value, "column_names")]
    if splits:
        shown = ", ".join(map(str, splits[:LISTED]))
        raise DataError(
            f"a data set with splits ({shown})", where=name, hint=f"give one of them, as data[{splits[0]!r}]"
        )
    if wrong or not columns:
        raise DataError(
            f"a dict holds one list per column, and {wrong[0]!r} is none" if wrong else "an empty dict",
            where=name,
            hint="give a single row as a list of one dict",
        )
    lists = {str(key): list(value) for key, value in columns.items()}
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {length}" for key, length in list(lengths.items())[:LISTED])
        raise DataError(f"the columns have different lengths ({found})", where=name)
    return (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))


def _is_frame(given: Any) -> bool:
    """Whether it is a pandas DataFrame, without importing pandas."""
    return any(
        cls.__module__.partition(".")[0] == "pandas" and cls.__name__ == "DataFrame" for cls in type(given).mro()
    )


def _of_frame(frame: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a DataFrame, by the names of its columns. Its index is left out."""
    labels = [str(label) for label in frame.columns]
    if len(set(labels)) < len(labels):
        raise DataError("two columns of the DataFrame have one name", where=name)
    present = frame.notna()
    columns: dict[str, Sequence[Any]] = {
        label: [
            _plain(value) if there else None for value, there in zip(frame.iloc[:, i], present.iloc[:, i], strict=True)
        ]
        for i, label in enumerate(labels)
    }
    return [dict(zip(labels, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """A cell of a DataFrame without numpy: read from Parquet, a conversation is an array of dicts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list) else value
