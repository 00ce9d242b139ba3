"""From a command line to a filled dataclass: defaults, then a YAML file, then flags; checked once all of them are read.

Options are flat for the person who writes them, ``--kl-coef 0.1`` or ``kl_coef: 0.1``, and nested for the code that
owns them: an algorithm's options live in its own ``Config``. A name means one option in all of a command, and its help
is the text under its field.
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
from tether.runtime.directory import FORMAT
from tether.untrusted import read_flat_yaml, shown

Command = TypeVar("Command")

REST = "rest"
"""Metadata of the field of a command that takes the arguments which it does not know, for another command."""
POSITIONAL = "positional"
"""Metadata of a field that is given without a flag; its value is the name that the help shows."""
RENAMED: Mapping[str, tuple[str, ...]] = {
    "products": ("matmul_dtype",),
    "refills": ("dynamic_sampling",),
    "kl_target": ("adaptive_kl_target",),
    "kl_horizon": ("adaptive_kl_horizon",),
    "samples_per_prompt": ("group_size",),
    "clip_eps": ("clip_low", "clip_high"),
    "value_clip_eps": ("value_clip",),
}
"""Names that options had before, and what they are called now."""


@dataclass(frozen=True)
class Option:
    """One option: a field of ``owner``, which is a command or a dataclass somewhere inside it."""

    name: str
    type: Any
    default: Any
    """``MISSING`` where it has to be given."""
    owner: type
    positional: str
    """The name in the help, for an option without a flag; else ""."""

    @property
    def flag(self) -> str:
        return self.positional or as_flag(self.name)

    @property
    def repeatable(self) -> bool:
        return typing.get_origin(self.type) is tuple

    @property
    def optional(self) -> bool:
        return types.NoneType in typing.get_args(self.type)


def as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
            yield Option(entry.name, hint, default, cls, entry.metadata.get(POSITIONAL, ""))


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
    """``did you mean X?`` for the first name that begins like this one or else the closest, or ""."""
    longer = [one for one in known if one.startswith(name)]
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def unknown_option(text: str, known: Sequence[Option], *, where: str = "") -> ConfigError:
    """The error for ``text``, a flag, or a key of the file ``where``, that is not among the options ``known``."""
    flags = text.startswith("-")
    plain = text.lstrip("-").replace("-", "_")
    named = {option.name: option.flag if flags else option.name for option in known if not option.positional}
    shown_text = text if flags else repr(text)
    now = [named[name] for name in RENAMED.get(plain, ()) if name in named]
    if now:
        return ConfigError(f"option {shown_text} is now called {' and '.join(now)}", where=where)
    close = nearest(text if flags else plain, list(named.values()))
    return ConfigError(f"unknown option {shown_text}", where=where, hint=close)


def coerce(option: Option, value: Any, *, where: str) -> Any:
    """``value`` as the option's type; numbers have to be finite, and integers to have 64 bits."""
    if option.repeatable and isinstance(value, str):
        value = [value]
    if isinstance(value, bool) and bool not in (option.type, *typing.get_args(option.type)):
        raise ConfigError(
            f"found {value}, and the option is not a yes or no", where=where, hint="YAML reads on, off, yes and no so"
        )
    try:
        made = pydantic.TypeAdapter(option.type, config=pydantic.ConfigDict(allow_inf_nan=False)).validate_python(value)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{message[0].lower()}{message[1:]}, found {shown(value)}", where=where) from None
    if isinstance(made, int) and not -(2**63) <= made < 2**63:
        raise ConfigError(f"input should be an integer of at most 64 bits, found {shown(value)}", where=where)
    if isinstance(made, str) and not _a_name(made):
        raise ConfigError(f"input should be text that can name a file, found {shown(value)}", where=where)
    return made


def _a_name(text: str) -> bool:
    """Whether ``text`` can be a path: no NUL, no unpaired surrogate, and not too long."""
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
                raise ConfigError(f"holds the options of 'tether {value}', and this is 'tether {name}'", where=path)
        elif plain == "format":
            if value != FORMAT:
                raise ConfigError(f"made by another version of tether (format {shown(value)})", where=path)
        elif plain not in known:
            raise unknown_option(key, options, where=path)
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
        what = unknown[0].split("=")[0]
        raise unknown_option(what, options) if what.startswith("-") else ConfigError(f"unknown argument {what}")
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
        raise ConfigError(f"missing: {', '.join(lacking)} (see 'tether {name} --help')")
    return build(cls, values)


def parser(name: str, cls: type, options: Sequence[Option]) -> Parser:
    """The parser of a command's flags, one group of help per dataclass; the result holds what was given only."""
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
                count: Any = {"nargs": "+"} if option.repeatable else {}
                group.add_argument(option.name, metavar=option.positional, help=described, **count)
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
    """The command with all that it requires."""
    needed = [
        f"{option.positional}{f' [{option.positional} ...]' if option.repeatable else ''}"
        if option.positional
        else f"{option.flag} {_metavar(option.type)}"
        for option in options
        if option.default is MISSING
    ]
    return " ".join(["tether", name, *needed, *(["[OPTIONS]"] if len(needed) < len(options) else [])])
