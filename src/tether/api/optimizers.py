"""An optimizer of one's own, as a function that makes it for the parameters of a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from tether.algorithms.optimise import OptimizerFactory
from tether.errors import ConfigError


def factory_of(given: Optimizer | OptimizerFactory) -> tuple[OptimizerFactory, str]:
    """A function from parameter groups to an optimizer, and the text that it is recognised by when a run resumes.

    ``given`` is such a function, a class, a ``functools.partial`` of one, or an optimizer: a run trains a copy of its
    model, so of an optimizer only the class and the options are used. Raises :class:`ConfigError` for one that has been
    used, or whose parameter groups have different options.
    """
    if isinstance(given, Optimizer):
        options = _options_of(given)
        return functools.partial(_remade, type(given), options), _named(type(given).__name__, options)
    if isinstance(given, functools.partial):
        return given, _named(getattr(given.func, "__name__", type(given.func).__name__), given.keywords)
    if not callable(given):
        raise ConfigError(
            f"found {given!r:.60}", where="optimizer", hint="give a torch optimizer, or a function that makes one"
        )
    return given, getattr(given, "__name__", type(given).__name__)


def _options_of(optimizer: Optimizer) -> dict[str, Any]:
    """The options of an optimizer, which are those of all of its parameter groups."""
    if optimizer.state:
        raise ConfigError(
            "the optimizer has been used, and a run would begin without what it remembers",
            where="optimizer",
            hint="give a new one",
        )
    kinds = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            "the parameter groups of the optimizer have different options",
            where="optimizer",
            hint="give a function that makes it of parameter groups",
        )
    return kinds[0]


def _remade(cls: type[Optimizer], options: Mapping[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of this class and these options, for other parameters. The options are those of each group, because
    not every class takes all of them as arguments."""
    needed = {"lr": options["lr"]} if "lr" in options else {}
    return cls([{**options, **group} for group in groups], **needed)


def _named(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in sorted(options.items()))})"
