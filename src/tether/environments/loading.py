"""From ``--env`` to the environment of each episode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from tether.environments.calculator import CalculatorEnvironment
from tether.environments.guess import GuessEnvironment
from tether.environments.maze import DISTANCES, MazeEnvironment
from tether.errors import EpisodeError
from tether.generation.environment import Environment
from tether.names import closest, did_you_mean
from tether.rewards.loading import Sources, load_source
from tether.untrusted import shown

Make = Callable[[], Environment]

BUILT_IN: Mapping[str, Make] = {
    "maze": MazeEnvironment,
    **{f"maze:{kind}": functools.partial(MazeEnvironment, kind) for kind in DISTANCES},
    "guess": GuessEnvironment,
    "calculator": CalculatorEnvironment,
}
"""What ``--env NAME`` finds."""


def load_environment(spec: str, *, sources: Sources, objects: Mapping[str, Make]) -> tuple[str, Make]:
    """The name and the maker of the environment behind ``spec``: built in, ``file.py:Class`` or ``module:Class``. One
    of the ``objects`` is known by its text. Raises :class:`EpisodeError` where it cannot be made."""
    if spec in objects:
        make = objects[spec]
        name = getattr(make, "__name__", type(make).__name__)
    elif spec in BUILT_IN:
        return spec.partition(":")[0], BUILT_IN[spec]
    else:
        make, name = _imported(spec, sources), spec.rpartition(":")[2]
    require_environment(make, where=spec)
    return name, make


def _imported(spec: str, sources: Sources) -> Make:
    source, colon, name = spec.rpartition(":")
    known = f"built in are {', '.join(BUILT_IN)}; others are file.py:Class and module:Class"
    if spec.endswith(".py"):
        raise EpisodeError("name the class too", where=spec, hint=f"as in {spec}:CLASS")
    if not colon:
        raise EpisodeError(
            "no such environment", where=spec, hint=f"{did_you_mean(closest(spec, list(BUILT_IN)))} {known}".lstrip()
        )
    module = load_source(spec, sources, kind="environment", known=known).module
    made = getattr(module, name, None)
    if not callable(made):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and hasattr(v, "step")]
        raise EpisodeError(
            f"{source} has no environment {name!r}", where=spec, hint=f"it has {', '.join(classes) or 'none'}"
        )
    return cast(Make, made)


def require_environment(make: Callable[[], Any], *, where: str) -> None:
    """Raise :class:`EpisodeError` where ``make()`` fails, or makes something without ``reset`` and ``step``."""
    try:
        made = make()
    except Exception as error:
        raise EpisodeError(
            f"it could not be made: {type(error).__name__}: {shown(error, str)}",
            where=where,
            hint="a class or a function that is called without arguments",
        ) from error
    for method, arguments in [("reset", (None,)), ("step", ("",))]:
        function = getattr(made, method, None)
        if not callable(function):
            raise EpisodeError(f"{type(made).__name__} has no method {method!r}", where=where)
        try:
            inspect.signature(function).bind(*arguments, **({"seed": 0} if method == "reset" else {}))
        except TypeError as error:
            form = "reset(prompt, *, seed)" if method == "reset" else "step(action)"
            raise EpisodeError(f"{method!r} is called as {form} ({error})", where=where) from None
        except ValueError:  # a compiled method, which tells nothing
            continue
