"""From a command line to a filled dataclass: defaults, then a YAML file, then flags; checked once all of them are read.

Options are flat for the person who writes them, ``--kl-coef 0.1`` or ``kl_coef: 0.1``, and nested for the code that
owns them: an algorithm's options live in its own ``Config``. A name means one option in all of a command, and its help
is the text under its field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import os
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import pydantic

from tether.errors import ConfigError
from tether.names import ELSEWHERE, RENAMED, closest, did_you_mean
from tether.presets import PRESETS, presets_of
from tether.runtime.directory import FORMAT
from tether.untrusted import read_flat_yaml, shown

Command = TypeVar("Command")

REST = "rest"
"""Metadata of the field of a command that takes the arguments which it does not know, for another command."""
REST_FILES = "rest_files"
"""Metadata of such a field: files and presets of options are the other command's too."""
NONE_GIVEN: Mapping[str, Any] = {}
NARROWEST, WIDEST = 80, 110
"""Columns of the help."""
POSITIONAL = "positional"
"""Metadata of a field that is given without a flag; its value is the name that the help shows."""


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


def instead_of(plain: str, named: Mapping[str, str]) -> str:
    """What to give in place of the unknown option ``plain``, of those that are ``named``, name to text; or ""."""
    if now := [named[name] for name in RENAMED.get(plain, ()) if name in named]:
        return f"is now called {' and '.join(now)}"
    if ours := [named[name] for name in ELSEWHERE.get(plain.rpartition(".")[2], ()) if name in named]:
        return f"use {' and '.join(ours)}"
    return did_you_mean([named[name] for name in closest(plain, list(named))])


def unknown_options(texts: Sequence[str], known: Sequence[Option], *, where: str = "") -> ConfigError:
    """The error for ``texts``, flags, or keys of the file ``where``, that are not among the options ``known``."""
    found: list[tuple[str, str]] = []
    for text in dict.fromkeys(texts):
        flags = text.startswith("-")
        named = {option.name: option.flag if flags else option.name for option in known if not option.positional}
        found.append((text if flags else repr(text), instead_of(text.lstrip("-").replace("-", "_"), named)))
    if len(found) > 1:
        return ConfigError(
            f"unknown options: {', '.join(f'{one} ({advice})' if advice else one for one, advice in found)}",
            where=where,
        )
    ((one, advice),) = found
    if advice.startswith("is now"):
        return ConfigError(f"option {one} {advice}", where=where)
    return ConfigError(f"unknown option {one}", where=where, hint=advice)


def coerce(option: Option, value: Any, *, where: str) -> Any:
    """``value`` as the option's type; numbers have to be finite, and integers to have 64 bits."""
    numbers = option.type == tuple[int, ...]
    if option.repeatable and (isinstance(value, str) or (numbers and type(value) is int)):
        value = [value]
    if numbers and isinstance(value, list):  # 1,4,8 is three of them
        value = [part for one in value for part in (one.split(",") if isinstance(one, str) else [one])]
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
    given = read_flat_yaml(Path(path))
    plain = {key: key.replace("-", "_") for key in given}
    made_by = next((value for key, value in given.items() if plain[key] == "command"), name)
    if made_by != name:
        raise ConfigError(f"holds the options of 'tether {made_by}', and this is 'tether {name}'", where=path)
    form = next((value for key, value in given.items() if plain[key] == "format"), FORMAT)
    unknown = [key for key in given if plain[key] not in known and plain[key] not in ("command", "format")]
    wrong = unknown_options(unknown, options, where=path) if unknown else None
    if form != FORMAT:
        error = ConfigError(f"made by another version of tether (format {shown(form)})", where=path)
        if wrong is not None:
            error.advise("; ".join(filter(None, [wrong.message, wrong.hint])))
        raise error
    if wrong is not None:
        raise wrong
    return {
        plain[key]: coerce(known[plain[key]], value, where=f"{path}: {key}")
        for key, value in given.items()
        if plain[key] in known
    }


def preset_values(chosen: str, name: str, options: Sequence[Option]) -> dict[str, Any]:
    """The options of a preset of the command ``name``. Raises :class:`ConfigError`."""
    known, own = {option.name: option for option in options}, presets_of(name)
    if chosen not in own:
        other = PRESETS.get(chosen)
        close = did_you_mean(closest(chosen, list(own)))
        raise ConfigError(
            f"{chosen!r} is a preset of 'tether {other.command}'" if other else f"there is no preset {chosen!r}",
            where="--preset",
            hint=f"{close} 'tether presets' lists them".strip(),
        )
    return {
        key: coerce(known[key], value, where=f"preset {chosen}: {key}") for key, value in own[chosen].options.items()
    }


class Parser(argparse.ArgumentParser):
    """One whose errors are a :class:`ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(
    name: str,
    cls: type[Command],
    arguments: Sequence[str],
    *,
    first: Sequence[str] = (),
    given: Mapping[str, Any] = NONE_GIVEN,
) -> Command:
    """A command from its command line, whose help shows the options ``first`` before the others. The line may leave out
    the options ``given``.

    What is wrong is one line in a :class:`ConfigError`; ``--help`` exits with 0.
    """
    options = list(options_of(cls))
    found, unknown = parser(name, cls, options, first).parse_known_args(arguments)
    rest = next((entry.name for entry in dataclasses.fields(cls) if REST in entry.metadata), None)  # type: ignore[arg-type]
    if unknown and rest is None:
        if not unknown[0].startswith("-"):
            raise ConfigError(f"unknown argument {unknown[0]}")
        raise unknown_options(
            [one.split("=")[0] for one in unknown if re.match("--?[A-Za-z]", one)] or unknown, options
        )
    texts = vars(found)
    chosen, path = texts.pop("preset", None), texts.pop("config", None)
    values = dict(given) | (preset_values(chosen, name, options) if chosen is not None else {})
    values |= read_yaml(path, name, options) if path else {}
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


def parser(name: str, cls: type, options: Sequence[Option], first: Sequence[str] = ()) -> Parser:
    """The parser of a command's flags; the result holds what was given only.

    The help has the options ``first`` in a group, and the others in one group per dataclass.
    """
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))
    made = Parser(
        prog=f"tether {name}",
        description=inspect.getdoc(cls),
        usage=_usage(name, options, width),
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=width),
    )
    if first:
        by_name = {option.name: option for option in options}
        _add(made.add_argument_group("most used"), [by_name[one] for one in first])
    for owner, members in itertools.groupby(options, key=lambda option: option.owner):
        others = [option for option in members if option.name not in first]
        own = "other options" if first else "options"
        title = own if owner is cls else group_title(owner)
        _add(made.add_argument_group(title), others)  # a group of none is not shown
    about = made.add_argument_group("help and files")
    own_files = not any(REST_FILES in entry.metadata for entry in dataclasses.fields(cls))
    if len(options) > 1 and own_files:
        about.add_argument("--config", metavar="FILE.yaml", help="Read options from a file; flags override it.")
    if presets_of(name):
        about.add_argument(
            "--preset",
            metavar="NAME",
            help="Begin with the options of a recipe, which a file and flags override; tether presets lists them.",
        )
    about.add_argument("-h", "--help", action="help", help="Show this and exit.")
    return made


def group_title(owner: type) -> str:
    """What the options of a dataclass stand under: the first line of its docstring."""
    return (inspect.getdoc(owner) or "").splitlines()[0].rstrip(".")


def _add(group: argparse._ArgumentGroup, options: Sequence[Option]) -> None:
    """The flags of ``options``, in this order."""
    for option in options:
        described = f"{documented(option.owner)[option.name]}{shown_default(option.default)}".replace("%", "%%")
        if option.positional:
            optional = {} if option.default is MISSING else {"nargs": "?"}
            count: Any = {"nargs": "+"} if option.repeatable else optional
            group.add_argument(option.name, metavar=option.positional, help=described, **count)
        elif option.type is bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=described)
        elif option.repeatable:
            group.add_argument(option.flag, action="extend", nargs="*", metavar=_metavar(option.type), help=described)
        else:
            group.add_argument(option.flag, metavar=_metavar(option.type), help=described)


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
    if typing.get_origin(hint) is not Literal:
        hint = next((inner for inner in typing.get_args(hint) if inner is not types.NoneType), hint)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return {int: "INT", float: "FLOAT", str: "TEXT"}[hint]


def shown_default(default: Any, *, write: Callable[[Any], str] = str) -> str:
    """The end of an option's help: its ``default`` as ``write`` gives it; "" where it is off or nothing."""
    if default is MISSING:
        return " (required)"
    return "" if default is None or default is False or default == () else f" (default {write(default)})"


def _usage(name: str, options: Sequence[Option], width: int) -> str:
    """The command with all that it requires, in lines of at most ``width`` columns."""
    needed = [
        f"{option.positional}{f' [{option.positional} ...]' if option.repeatable else ''}"
        if option.positional
        else f"{option.flag} {_metavar(option.type)}"
        for option in options
        if option.default is MISSING
    ]
    lines = [f"tether {name}"]
    for part in [*needed, *(["[OPTIONS]"] if len(needed) < len(options) else [])]:
        if len("usage: ") + len(lines[-1]) + 1 + len(part) > width:
            lines.append(" " * len("usage: tether"))
        lines[-1] += f" {part}"
    return "\n".join(lines)
