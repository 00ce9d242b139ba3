"""Rows that are made on demand: ``--prompts maze:count=1000,seed=1,size=5`` in place of a file.

The same text makes the same rows, everywhere; another ``seed`` makes others. A name stands before a file or a directory
of the same name, which is then written ``./maze``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tether.data.memory import Rows, Source
from tether.environments import arithmetic, calculator, guess, maze, reasoning
from tether.errors import DataError
from tether.names import closest, did_you_mean


@dataclass(frozen=True)
class Kind:
    """One kind of rows."""

    rows: Callable[..., Sequence[dict[str, Any]]]
    """Takes ``count``, ``seed`` and the options. Raises :class:`ValueError` where there are none such."""
    options: Mapping[str, tuple[int, int, int]]
    """Default, least and largest value of each option."""


COUNT = {"count": (1000, 1, 10**6), "seed": (0, 0, 2**31)}
KINDS: Mapping[str, Kind] = {
    "maze": Kind(maze.rows, {"size": (4, 2, maze.LARGEST), "walls": (4, 0, 60), "moves": (10, 1, 100)}),
    "guess": Kind(guess.rows, {"largest": (8, 1, guess.LARGEST - 1), "guesses": (8, 1, 100)}),
    "problems": Kind(calculator.rows, {"largest": (20, 2, 1000), "right": (100, 0, 100)}),
    "arithmetic": Kind(arithmetic.rows, {"largest": (99, 1, 10**6), "right": (100, 0, 100)}),
}

GYM = "reasoning-gym"
"""``reasoning-gym:TASK,count=...``: problems of that library."""


def is_generated(source: str) -> bool:
    """Whether a source names a kind of rows, and no file.

    >>> is_generated("maze:count=10"), is_generated("maze"), is_generated("./maze"), is_generated("maze.jsonl")
    (True, True, False, False)
    """
    return source.partition(":")[0] in (*KINDS, GYM)


def made(source: Source) -> Source:
    """The rows that a source asks to make; any other source as it is. Raises :class:`DataError`."""
    if not isinstance(source, str) or not is_generated(source):
        return source
    name, _, rest = source.partition(":")
    if name == GYM:
        task, _, rest = rest.partition(",")
        make: Callable[..., Sequence[dict[str, Any]]] = partial(reasoning.rows, task=task)
        values = _options(rest, COUNT, where=source)
    else:
        make = KINDS[name].rows
        values = _options(rest, COUNT | dict(KINDS[name].options), where=source)
    try:
        return Rows(source, tuple(make(**values)))
    except ValueError as error:
        raise DataError(str(error), where=source) from None


def _options(text: str, known: Mapping[str, tuple[int, int, int]], *, where: str) -> dict[str, int]:
    """``key=value,key=value`` over the defaults."""
    values = {name: default for name, (default, _, _) in known.items()}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if name not in known:
            raise DataError(
                f"no option {name!r}",
                where=where,
                hint=f"{did_you_mean(closest(name, list(known)))} it has {', '.join(known)}".lstrip(),
            )
        _, least, most = known[name]
        if not equals or not re.fullmatch("[0-9]{1,10}", value) or not least <= int(value) <= most:
            raise DataError(f"{name} is a whole number from {least} to {most}, not {value!r}", where=where)
        values[name] = int(value)
    return values
