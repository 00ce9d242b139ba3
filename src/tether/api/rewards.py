"""Rewards as Python gives them: a function, the text of the command line, or either with a weight or a name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from tether.errors import ConfigError, RewardError
from tether.rewards.combine import Reward
from tether.rewards.resolve import split_name, split_weight
from tether.training.given import described
from tether.untrusted import shown

RewardLike = str | Callable[..., Any] | Reward
"""One reward without its weight. A function has the signature of TRL: lists over completions in, a list out."""


@dataclass(frozen=True)
class Rewards:
    """Rewards as the options of the command line name them, and the Python objects behind those names."""

    specs: tuple[str, ...]
    objects: Mapping[str, Callable[..., Any] | Reward] = field(default_factory=dict)


def rewards_of(given: Any, *, argument: str = "rewards") -> Rewards:
    """One reward, a list of them, or a dict with their names; each alone or as ``(reward, weight)``.

    Raises :class:`ConfigError` that says which one is no reward.
    """
    if isinstance(given, Mapping):
        items = [(str(name), one) for name, one in given.items()]
    else:
        alone = not isinstance(given, Sequence) or isinstance(given, str) or _weighted(given)
        items = [("", one) for one in ([given] if alone else given)]
    if not items:
        raise ConfigError(f"{argument} must hold at least one")
    specs: list[str] = []
    objects: dict[str, Callable[..., Any] | Reward] = {}
    for number, (name, item) in enumerate(items, 1):
        where = f"{argument}[{name!r}]" if name else f"{argument}, number {number}"
        reward, weight = (item[0], item[1]) if _weighted(item) else (item, None)
        spec = _as_spec(name, reward, objects, where)
        if weight is not None and split_weight(split_name(spec)[1])[0] != split_name(spec)[1]:
            raise ConfigError(f"has a weight in its text, {spec!r}, and beside it, {weight!r}", where=where)
        specs.append(spec if weight is None else f"{spec}={float(weight)!r}")
    return Rewards(tuple(specs), objects)


def _weighted(given: Any) -> bool:
    """Whether it is ``(reward, weight)``."""
    pair = isinstance(given, tuple | list) and len(given) == 2
    return pair and isinstance(given[1], Real) and not isinstance(given[1], bool)


def _as_spec(name: str, reward: Any, objects: dict[str, Any], where: str) -> str:
    """``[NAME:=]SPEC`` of a reward; an object is put into ``objects`` under its SPEC."""
    if isinstance(reward, str | os.PathLike):
        text = os.fspath(reward)
        if name and split_name(text)[0]:
            raise ConfigError(f"has two names, {name!r} and that in {text!r}", where=where)
        return f"{name}:={text}" if name else str(text)
    if not (callable(reward) or hasattr(reward, "judge")):
        raise ConfigError(
            f"found {shown(reward)}, which is no reward",
            where=where,
            hint="give a function, a text such as 'length:40', or (reward, weight)",
        )
    name = name or name_of(reward)
    spec = described(f"reward {name}")
    if spec in objects:
        raise RewardError(
            f"two rewards are named {name!r}", where=where, hint="name them: rewards={'short': f, 'clear': g}"
        )
    objects[spec] = reward
    return f"{name}:={spec}"


def name_of(reward: Any) -> str:
    """The name that a function or an object has, as far as the name of a metric can hold it.

    >>> name_of(lambda completions: completions)
    'lambda'
    """
    found = getattr(reward, "name", None) if hasattr(reward, "judge") else None
    function = getattr(reward, "func", reward)  # of a functools.partial
    name = found or getattr(function, "__name__", None) or type(reward).__name__
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", str(name)).strip("_") or "reward"
