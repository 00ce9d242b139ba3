"""Columns under other names than a command reads."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tether.data.reading import Row, RowError
from tether.errors import ConfigError


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """``prompt=question`` as {"prompt": "question"}. Raises :class:`ConfigError`."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, own = (part.strip() for part in text.partition("="))
        if not (name and equals and own):
            raise ConfigError(f"{text!r} is not NAME=COLUMN", where="--columns", hint="such as prompt=question")
        if name in found:
            raise ConfigError(f"{name} is named twice", where="--columns")
        found[name] = own
    return found


def missing(column: str, row: Row) -> RowError:
    """The error for a row without a column, which names those that it has."""
    names = [reprlib.repr(name) for name in list(row.values)[:8]] + ["..."] * (len(row.values) > 8)
    return RowError("missing column", f"column {column} is missing; the row has {', '.join(names) or 'no columns'}")


def renamed(row: Row, names: Mapping[str, str]) -> Row:
    """The row with each column under its name for the command. Raises :class:`RowError` where it lacks one."""
    if lacking := next((own for own in names.values() if own not in row.values), None):
        raise missing(f"{lacking!r} (--columns)", row)
    taken = set(names.values())
    rest = {name: value for name, value in row.values.items() if name not in taken}
    return replace(row, values=rest | {name: row.values[own] for name, own in names.items()})
