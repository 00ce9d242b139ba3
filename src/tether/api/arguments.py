"""Keyword arguments of a function from the options of a command: names, defaults, help, and how errors name them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from tether.errors import ConfigError, TetherError
from tether.flags import Option, build, coerce, documented, group_title, instead_of, shown_default

Command = TypeVar("Command")

WIDTH = 100
"""Columns of a docstring."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A keyword argument."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    help: str
    title: str
    """What it stands under in the docstring."""

    @property
    def shown_default(self) -> str:
        """As the command line shows it, but with the value as Python writes it."""
        return shown_default(MISSING if self.default is inspect.Parameter.empty else self.default, write=repr)


def parameters_of(options: Sequence[Option], cls: type, *, title: str) -> list[Parameter]:
    """The ``options`` of the command ``cls`` as keyword arguments; ``title`` is that of its own."""
    return [
        Parameter(
            name=option.name,
            annotation=option.type,
            default=inspect.Parameter.empty if option.default is MISSING else option.default,
            help=documented(option.owner)[option.name],
            title=title if option.owner is cls else group_title(option.owner),
        )
        for option in options
    ]


def describe(
    function: Callable[..., Any], parameters: Sequence[Parameter], *, doc: str, returns: type, first: Sequence[str] = ()
) -> None:
    """Give ``function`` the signature and the docstring of these keyword arguments; those called ``first`` may be given
    by position."""
    kinds = dict.fromkeys(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature(
        [
            inspect.Parameter(
                one.name,
                kinds.get(one.name, inspect.Parameter.KEYWORD_ONLY),
                default=one.default,
                annotation=one.annotation,
            )
            for one in parameters
        ],
        return_annotation=returns,
    )
    setattr(function, "__signature__", signature)  # noqa: B010 - a plain function has no such attribute for mypy
    function.__doc__ = f"{doc.strip()}\n\n{documentation(parameters)}"


def documentation(parameters: Sequence[Parameter]) -> str:
    """The arguments by group, each with its help and its default."""
    lines: list[str] = []
    for title, members in itertools.groupby(parameters, key=lambda one: one.title):
        lines += [title, "-" * len(title)]
        for one in members:
            text = f"{one.help}{one.shown_default}"
            lines += [one.name, *textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")]
        lines.append("")
    return "\n".join(lines)


def require_known(names: Sequence[str], known: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` for the first of ``names`` that is no argument; ``renamed`` is from options to
    arguments."""
    for name in names:
        if name not in known:
            advice = instead_of(name, {**{one: one for one in known}, **renamed})
            raise ConfigError(f"unknown argument {name!r}", hint=advice)


def filled(cls: type[Command], options: Sequence[Option], values: Mapping[str, Any]) -> Command:
    """The command with these flat ``values``, each checked against the type of its option."""
    known = {option.name: option for option in options}
    return build(cls, {name: coerce(known[name], plain(value), where=name) for name, value in values.items()})


def plain(value: Any) -> Any:
    """A path as text, and a number of numpy or torch as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def as_argument(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def resumed_by(again: str, text: str) -> str:
    """``text`` with ``again`` in the place of ``'tether resume DIR'``."""
    return re.sub(r"'tether resume [^']*'", lambda _: again, text)


@contextlib.contextmanager
def named_as_arguments(options: Sequence[Option], renamed: Mapping[str, str], *, again: str) -> Iterator[None]:
    """Errors name arguments where they would name flags of the command line: ``kl_coef`` and not ``--kl-coef``.

    ``renamed`` says which option has another name here, and ``again`` what takes the place of ``tether resume``.
    """
    names = {option.flag: renamed.get(option.name, option.name) for option in options}
    switches = [option.flag for option in options if option.type is bool]
    names |= {flag: f"{as_argument(flag)}=True" for flag in [*switches, "--allow"]}

    def translated(text: str) -> str:
        text = re.sub(r"--[a-z][a-z0-9-]*", lambda found: names.get(found[0], found[0]), text)
        return resumed_by(again, text)

    try:
        yield
    except TetherError as error:
        error.message, error.where, error.hint = map(translated, (error.message, error.where, error.hint))
        raise
