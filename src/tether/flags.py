"""From a command line to a filled dataclass: defaults, then a YAML file, then flags; checked once all of them are read.

Options are flat for the person who writes them, ``--kl-coef 0.1`` or ``kl_coef: 0.1``, and nested for the code that
owns them: an algorithm's options live in its own ``Config``. A name stands for one option in all of a command, and
what is said about it is the text under its field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import pydantic

from tether.errors import ConfigError
from tether.untrusted import read_flat_yaml, shown

Command = TypeVar("Command")

REST = "rest"
"""Marks the field of a command that takes the arguments which it does not know, for another command."""


@dataclass(frozen=True)
class Option:
    """One option: a field of ``owner``, which is a command or a dataclass somewhere inside it."""

    name: str
    type: Any
    default: Any
    """``MISSING`` where it has to be given."""
    owner: type
    positional: bool

    @property
    def flag(self) -> str:
        return self.name if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def repeatable(self) -> bool:
        return typing.get_origin(self.type) is tuple

    @property
    def optional(self) -> bool:
        return types.NoneType in typing.get_args(self.type)


def fields_of(cls: type, defaults: Any = MISSING) -> Iterator[tuple[dataclasses.Field[Any], Any, Any]]:
    """``(field, type, default)`` of each field, the default from the instance ``defaults`` where there is one."""
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        if defaults is not MISSING:
            default = getattr(defaults, entry.name)
        else:
            factory: Any = entry.default_factory
            default = entry.default if factory is MISSING else factory()
        yield entry, hints[entry.name], default


def options_of(cls: type, defaults: Any = MISSING) -> Iterator[Option]:
    """Every option of a command, flat."""
    for entry, hint, default in fields_of(cls, defaults):
        if dataclasses.is_dataclass(hint):
            yield from options_of(typing.cast(type, hint), default)
        elif REST not in entry.metadata:
            yield Option(entry.name, hint, default, cls, "positional" in entry.metadata)


def build(cls: type[Command], values: Mapping[str, Any], defaults: Any = MISSING) -> Command:
    """A command from flat ``values``, which hold all that has no default."""
    arguments = {
        entry.name: build(typing.cast(type, hint), values, default)
        if dataclasses.is_dataclass(hint)
        else values.get(entry.name, default)
        for entry, hint, default in fields_of(cls, defaults)
    }
    return cls(**arguments)


def flatten(command: Any) -> dict[str, Any]:
    """A filled command as flat, plain data, for ``config.yaml``."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(command):
        value = getattr(command, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value)
        else:
            flat[entry.name] = list(value) if isinstance(value, tuple) else value
    return flat


def nearest(name: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` for the first name that goes on like this one or else the closest, or nothing."""
    longer = [one for one in known if one.startswith(name)]
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def coerce(option: Option, value: Any, *, where: str) -> Any:
    """``value`` as the option's type; numbers have to be finite, and integers to have 64 bits."""
    if option.repeatable and isinstance(value, str):
        value = [value]
    try:
        made = pydantic.TypeAdapter(option.type, config=pydantic.ConfigDict(allow_inf_nan=False)).validate_python(value)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: {message[0].lower()}{message[1:]}, found {shown(value)}") from None
    if isinstance(made, int) and not -(2**63) <= made < 2**63:
        raise ConfigError(f"{where}: input should be an integer of at most 64 bits, found {shown(value)}")
    if isinstance(made, str) and not _a_name(made):
        raise ConfigError(f"{where}: input should be text that a file can have for a name, found {shown(value)}")
    return made


def _a_name(text: str) -> bool:
    """Whether a system takes ``text`` for a path: without NUL and half characters, and not too long."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in path and len(path) < 4096 and all(len(part) < 256 for part in path.split(b"/"))


def read_yaml(path: str, name: str, options: Sequence[Option]) -> dict[str, Any]:
    """The flat options in a YAML file, names checked and values coerced. A run's ``config.yaml`` is such a file."""
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for key, value in read_flat_yaml(Path(path)).items():
        plain = key.replace("-", "_")
        if plain == "command":
            if value != name:
                raise ConfigError(f"{path}: holds the options of 'tether {value}', and this is 'tether {name}'")
        elif plain not in known:
            raise ConfigError(f"{path}: unknown option {key!r}{nearest(plain, list(known))}")
        else:
            values[plain] = coerce(known[plain], value, where=f"{path}: {key}")
    return values


class Parser(argparse.ArgumentParser):
    """One whose errors are a :class:`ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(name: str, cls: type[Command], arguments: Sequence[str]) -> Command:
    """A command from its command line. What is wrong is one line in a :class:`ConfigError`; ``--help`` exits with 0."""
    options = list(options_of(cls))
    given, unknown = parser(name, cls, options).parse_known_args(arguments)
    rest = next((entry.name for entry in dataclasses.fields(cls) if REST in entry.metadata), None)  # type: ignore[arg-type]
    if unknown and rest is None:
        flags = [option.flag for option in options if not option.positional]
        what = unknown[0].split("=")[0]
        kind = "option" if what.startswith("-") else "argument"
        raise ConfigError(f"unknown {kind} {what}{nearest(what, flags) if kind == 'option' else ''}")
    texts = vars(given)
    values = read_yaml(path, name, options) if (path := texts.pop("config", None)) else {}
    for option in options:
        if option.name in texts:
            text = texts[option.name]
            values[option.name] = (
                None if option.optional and text == "none" else coerce(option, text, where=option.flag)
            )
    if rest is not None:
        values[rest] = tuple(unknown)
    lacking = [option.flag for option in options if option.default is MISSING and option.name not in values]
    if lacking:
        raise ConfigError(f"missing: {', '.join(lacking)} ('tether {name} --help' explains)")
    return build(cls, values)


def parser(name: str, cls: type, options: Sequence[Option]) -> Parser:
    """The parser of a command's flags, one group of help for each dataclass; what is not given is left out."""
    made = Parser(
        prog=f"tether {name}",
        description=inspect.getdoc(cls),
        usage=_usage(name, options),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    for owner, members in itertools.groupby(options, key=lambda option: option.owner):
        title = "options" if owner is cls else (inspect.getdoc(owner) or "").splitlines()[0].rstrip(".")
        group, texts = made.add_argument_group(title), documented(owner)
        for option in members:
            described = f"{texts[option.name]}{_default(option)}".replace("%", "%%")
            if option.positional:
                group.add_argument(option.name, metavar=option.name.upper(), help=described)
            elif option.type is bool:
                group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=described)
            elif option.repeatable:
                group.add_argument(option.flag, action="extend", nargs="*", metavar="TEXT", help=described)
            else:
                group.add_argument(option.flag, metavar=_metavar(option.type), help=described)
    others = made.add_argument_group("other")
    if len(options) > 1:
        others.add_argument("--config", metavar="FILE.yaml", help="Read options from a file; flags override it.")
    others.add_argument("-h", "--help", action="help", help="Show this and exit.")
    return made


@functools.cache
def documented(cls: type) -> Mapping[str, str]:
    """The text under each field of a dataclass, from its source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        entry.target.id: " ".join(text.value.value.split())
        for entry, text in itertools.pairwise(definition.body)
        if isinstance(entry, ast.AnnAssign)
        and isinstance(entry.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _metavar(hint: Any) -> str:
    """What stands for the value in the help: ``FLOAT``, ``{k1,k2}``."""
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    plain = next((inner for inner in typing.get_args(hint) if inner is not types.NoneType), hint)
    return {int: "INT", float: "FLOAT", str: "TEXT"}[plain]


def _default(option: Option) -> str:
    if option.default is MISSING:
        return " (required)"
    silent = option.default is None or option.default is False or option.default == ()
    return "" if silent else f" (default {option.default})"


def _usage(name: str, options: Sequence[Option]) -> str:
    """The command with all that it needs."""
    needed = [
        option.name.upper() if option.positional else f"{option.flag} {_metavar(option.type)}"
        for option in options
        if option.default is MISSING
    ]
    return " ".join(["tether", name, *needed, *(["[OPTIONS]"] if len(needed) < len(options) else [])])
