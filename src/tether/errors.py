"""The errors a person can act on. Each becomes one line on the terminal and an exit code, never a traceback."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal


class TetherError(Exception):
    """Something outside the program is wrong: ``message`` says what, ``where`` it is, and ``hint`` what to do.

    ``str(error)`` is the one line ``where: message; hint``. Code that an error passes through may add to it
    (:meth:`at`, :meth:`advise`) and raise it again; it never builds a new error from an old one's text.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: object = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.hint = message, str(where), hint

    def at(self, where: object) -> None:
        """Say where it happened: a place that holds the one the error names, such as the step of a file."""
        place = str(where)
        if not self.where.startswith(place):
            self.where = f"{place}: {self.where}" if self.where else place

    def advise(self, hint: str) -> None:
        """Add one more thing to do."""
        self.hint = "; ".join(filter(None, [self.hint, hint]))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the line, after the traceback of foreign code that caused it."""
        cause = traceback.format_exception(self.__cause__) if self.__cause__ is not None else []
        return [*"".join(cause).splitlines(), f"{type(self).__name__}: {self}"]

    def __str__(self) -> str:
        located = f"{self.where}: {self.message}" if self.where else self.message
        return f"{located}; {self.hint}" if self.hint else located


class ConfigError(TetherError):
    """An option or a combination of options that cannot work."""

    @staticmethod
    def unless(options: object, checks: Mapping[str, bool]) -> None:
        """Raise for the first message whose check is False, with the values of the fields of ``options`` that it names.

        ``options`` is a dataclass. ``{"kl_coef must be 0 or more: why": ...}`` becomes ``kl_coef must be 0 or more,
        found -1: why``.
        """
        for message, holds in checks.items():
            if not holds:
                raise ConfigError(with_values(message, options))

    @staticmethod
    def unless_typed(options: object) -> None:
        """Raise for the first field of the dataclass ``options`` whose value is not of its type. A number may be an
        integer, and a list stands for a tuple."""
        for name, hint in hints_of(options).items():
            value = getattr(options, name)
            if not is_a(value, hint):
                raise ConfigError(f"{name} must be {in_words(hint)}, found {value!r:.80}")


class DataError(TetherError):
    """A data file that is missing, malformed or holds a row that cannot be used."""


class ModelError(TetherError):
    """A model or tokenizer that cannot be loaded, does not fit, or does not survive a save."""


class RewardError(TetherError):
    """A reward that cannot be loaded or that failed; a failed reward is never a zero."""


class EpisodeError(RewardError):
    """An environment that cannot be loaded or that failed."""


class RunError(TetherError):
    """A run directory that cannot be used."""


class MemoryShortError(TetherError):
    """What has to be computed does not fit into memory, in however small pieces."""


class GuardError(TetherError):
    """A guard or an alarm stopped the run: a quantity that must be finite was not, or a limit was passed."""

    exit_code = 3


def with_values(message: str, options: object) -> str:
    """``message`` with what its first clause names of ``options``: ``..., found 3``, or ``..., found a 3, b 2``."""
    clause, colon, rest = message.partition(":")
    values = dict(fields_within(options))
    named = [name for name in dict.fromkeys(re.findall(r"(?<![-\w])\w+", clause)) if name in values]
    if not named:
        return message
    found = [f"{values[name]!r:.80}" for name in named]
    shown = (
        found[0] if len(named) == 1 else ", ".join(f"{name} {value}" for name, value in zip(named, found, strict=True))
    )
    return f"{clause}, found {shown}{colon}{rest}"


def fields_within(options: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of each field of a dataclass; in place of a field that is one, those of its own."""
    for name in hints_of(options):
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            yield from fields_within(value)
        else:
            yield name, value


def hints_of(options: Any) -> Mapping[str, Any]:
    """The type of each field of a dataclass."""
    cls: Any = type(options)
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(cls)}


def is_a(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of a type that options have: a plain one, a choice, a tuple, a class, or several of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(is_a(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(is_a(one, inner[0]) for one in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """What :func:`is_a` asks for: ``an integer or None``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(in_words, inner))
    if origin is Literal:
        return " or ".join(map(str, inner)) if len(inner) < 3 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each item {in_words(inner[0])}"
    if origin is Mapping:
        return "a mapping"
    plain = {int: "an integer", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return plain.get(hint) or f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"


def reason_of(error: Exception) -> str:
    """What an error of another library says, in one line: its first, and the next where that one is a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
