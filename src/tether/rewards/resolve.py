"""From ``--reward`` values to a scorer.

A value is ``[NAME:=]SPEC[=WEIGHT]``. SPEC is a rule (``length:40``), a Python function (``file.py:function`` or
``module:function``), a reward model (a directory or a hub id), the address of a server (``http://host:port/path``) or a
judge (``judge:file.yaml``). Each reward is reported by its name: NAME, else the short name of SPEC (``length``,
``function``, the name of the directory, the host or the judge's file), else, where another reward has that too, SPEC.

NAME consists of ASCII letters, digits, ``_``, ``-`` and ``.``. So ``format:=x`` names the reward ``x``; a regular
expression that begins with ``=`` is written ``format:[=]x``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from tether.errors import RewardError, TetherError
from tether.models.linear import round_matmuls
from tether.models.loading import BASE
from tether.models.reward import load_reward_model
from tether.rewards.client import Requests, address, token_from
from tether.rewards.combine import Reward, WeightedSum, require_distinct
from tether.rewards.function import FunctionReward
from tether.rewards.judge import JudgeReward
from tether.rewards.judge_file import load_judge
from tether.rewards.learned import LearnedReward
from tether.rewards.loading import Sources, load_function
from tether.rewards.remote import TOKEN, RemoteReward
from tether.rewards.replies import Replies
from tether.rewards.rules import RULES, rules_like
from tether.rewards.signature import signature_of
from tether.untrusted import printable


def split_name(value: str) -> tuple[str | None, str]:
    """``"NAME:=R"`` as ``("NAME", "R")``; anything else as ``(None, value)``.

    >>> split_name("short:=length:40=0.1")
    ('short', 'length:40=0.1')
    """
    name, _, rest = value.partition(":")
    if not rest.startswith("="):
        return None, value
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise RewardError(
            f"the name {name!r} of a reward may hold ASCII letters, digits, '_', '-' and '.' only",
            where=f"--reward {value}",
        )
    if rest == "=":
        raise RewardError("no reward after the name", where=f"--reward {value}", hint="write NAME:=SPEC")
    return name, rest[1:]


def split_weight(value: str) -> tuple[str, float]:
    """``"R=0.5"`` as ``("R", 0.5)``; without a number after the last ``=``, all of it is SPEC and the weight is 1."""
    spec, _, tail = value.rpartition("=")
    try:
        weight = float(tail)
    except ValueError:
        return value, 1.0
    if not spec:
        return value, 1.0
    if not math.isfinite(weight):
        raise RewardError("the weight must be a finite number", where=f"--reward {value}")
    return spec, weight


def require_weight(value: str) -> None:
    """Raise :class:`RewardError` where what follows the last ``=`` of a ``--reward`` value, and was taken for a part of
    SPEC, can only be a weight: after a rule that takes no such text, a function, or a model that is there."""
    spec, equals, tail = split_name(value)[1].rpartition("=")
    rule, colon, _ = spec.partition(":")
    if not equals or not spec or _is_number(tail) or rule == "format":
        return
    function = colon and spec.rpartition(":")[2].isidentifier()
    server = is_address(spec) and "?" not in spec
    model = os.path.exists(spec) and not os.path.exists(f"{spec}={tail}")
    if rule in RULES or function or server or model or judge_file(spec):
        raise RewardError(
            f"the weight {tail!r} is not a number", where=f"--reward {value}", hint=f"write {spec}=0.5 for half of it"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_address(spec: str) -> bool:
    """Whether a SPEC is meant as an address."""
    return "://" in spec


def judge_file(spec: str) -> str | None:
    """The file of a judge, None for another SPEC.

    >>> judge_file("judge:helpful.yaml"), judge_file("judge:function")
    ('helpful.yaml', None)
    """
    kind, _, file = spec.partition(":")
    return file if kind == "judge" and file.endswith((".yaml", ".yml")) else None


def short_name(spec: str) -> str:
    """A rule or function without its argument or file, a model without its path, the host of an address.

    A path that states no name, such as ``model`` or ``..``, has that of the directory it leads to.

    >>> [short_name(spec) for spec in ("length:40", "rewards.py:speech", "runs/judge/model", "http://host:5000/score")]
    ['length', 'speech', 'judge', 'host']
    """
    rule = spec.partition(":")[0]
    if rule in RULES:
        return rule
    if file := judge_file(spec):
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(file).stem)
    if is_address(spec):
        return re.split(r"[/:]", spec.partition("://")[2])[0] or "reward"
    if ":" in spec:
        return spec.rpartition(":")[2]
    for path in (Path(spec), Path(os.path.abspath(spec))):
        name = path.parent.name if path.name == "model" else path.name
        if name.strip("."):
            return name
    return Path(spec).name.strip(".") or "reward"


def part_names(rewards: Sequence[tuple[str | None, str]]) -> list[str]:
    """What each (NAME or None, SPEC) is reported by: NAME, its short name, or SPEC where the short name is taken.

    Raises :class:`RewardError` where two names are equal even so.
    """
    names = [name or short_name(spec) for name, spec in rewards]
    names = [
        printable(spec) if name is None and names.count(short) > 1 else short
        for (name, spec), short in zip(rewards, names, strict=True)
    ]
    require_distinct(names)
    return names


Objects = Mapping[str, Callable[..., Any] | Reward]
"""Functions and rewards that are Python objects, by the SPEC that stands for them."""
NOTHING: Objects = {}
REQUESTS = Requests()


def as_reward(
    name: str, given: Callable[..., Any] | Reward, *, deadline: float | None = None, retries: int = 0
) -> Reward:
    """A function as a reward called ``name``, or a :class:`tether.rewards.combine.Reward`, renamed if it has to be."""
    if not hasattr(given, "judge"):
        return FunctionReward(name, given, deadline, retries)
    reward = cast(Reward, given)
    if reward.name == name:
        return reward
    if not is_dataclass(reward):
        raise RewardError(f"the reward is named {reward.name!r} and was given as {name!r}", hint="use one name")
    return cast(Reward, replace(reward, name=name))


def resolve_reward(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    rounded: bool = False,
    deadline: float | None = None,
    retries: int = 0,
    requests: Requests = REQUESTS,
    sources: Sources | None = None,
    objects: Objects = NOTHING,
) -> Reward:
    """The reward behind ``spec``: a rule, an address, a judge, a function or a reward model, tried in this order.

    It is reported by ``name``, or else by its short name. ``deadline`` (seconds) is that of what is not computed here,
    ``retries`` are those of a Python function and ``requests`` those of a server: built-in rewards neither hang nor
    recover. ``sources`` holds the files that other rewards are from, ``objects`` those that are Python objects.
    """
    name = name or short_name(spec)
    if spec in objects:
        return as_reward(name, objects[spec], deadline=deadline, retries=retries)
    rule, colon, argument = spec.partition(":")
    if rule in RULES:
        return FunctionReward(name, RULES[rule](argument if colon else None))
    if is_address(spec):
        url = address(spec)
        return RemoteReward(
            name=name,
            url=url,
            token=token_from(TOKEN, url),
            deadline=deadline,
            requests=requests,
            signature=signature_of(tokenizer),
        )
    if file := judge_file(spec):
        return judge_reward(name, Path(file), deadline=deadline, requests=requests)
    if ":" in spec:
        return replace(load_function(spec, deadline=deadline, retries=retries, sources=sources), name=name)
    if spec.endswith(".py"):
        raise RewardError(f"name the function too, as in {spec}:FUNCTION", where=spec)
    if not os.path.exists(spec) and spec.count("/") != 1 and spec != BASE:
        raise RewardError(
            "no such reward",
            where=spec,
            hint=f"{rules_like(spec)}; others are a reward-model directory or hub id, file.py:function, "
            "module:function, http://host:port/path and judge:file.yaml",
        )
    model, own = load_reward_model(spec, dtype=dtype, device=device)
    if rounded:
        round_matmuls(model)
    return LearnedReward.of(name, model.requires_grad_(False), own, tokenizer)


def judge_reward(name: str, file: Path, *, deadline: float | None, requests: Requests) -> JudgeReward:
    """The judge in ``file``, whose replies are kept where the file says."""
    judge, key = load_judge(file)
    replies = Replies(None if judge.cache is None else file.parent / judge.cache)
    return JudgeReward(name=name, file=judge, key=key, deadline=deadline, requests=requests, replies=replies)


def resolve_scorer(
    values: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounded: bool = False,
    deadline: float | None = None,
    retries: int = 0,
    requests: Requests = REQUESTS,
    objects: Objects = NOTHING,
) -> WeightedSum:
    """All ``--reward`` values as one scorer.

    ``rounded`` gives reward models :func:`tether.models.linear.round_matmuls`; ``deadline`` and ``retries`` are
    those of each :class:`tether.rewards.function.FunctionReward` from a file or a module; ``deadline`` and ``requests``
    are those of each server.
    """
    for value in values:
        require_weight(value)
    named = [split_name(value) for value in values]
    weighted = [split_weight(rest) for _, rest in named]
    names = part_names([(name, spec) for (name, _), (spec, _) in zip(named, weighted, strict=True)])
    rewards: list[tuple[Reward, float]] = []
    sources = Sources()
    for (given, _), name, (spec, weight) in zip(named, names, weighted, strict=True):
        try:
            reward = resolve_reward(
                spec,
                tokenizer,
                name=name,
                dtype=dtype,
                device=device,
                rounded=rounded,
                deadline=deadline,
                retries=retries,
                requests=requests,
                sources=sources,
                objects=objects,
            )
        except TetherError as error:
            if given == "format":
                error.advise("for text that begins with '=', write format:[=]" + spec)
            raise
        rewards.append((reward, weight))
    return WeightedSum(tuple(rewards))
