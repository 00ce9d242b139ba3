"""What may differ when a run is resumed, and what may not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from tether.errors import ConfigError, DataError
from tether.rewards.resolve import is_address, judge_file, short_name, split_name, split_weight
from tether.rewards.rules import RULES, TAKES_FILE

OF_THE_PROCESS = frozenset({"out", "overwrite", "quiet", "stop_after", "track"})
"""Options of the process, not of the run."""
SAFE = frozenset(
    {
        "steps", "rounds", "epochs", "save_every", "keep_last", "keep_best", "rollouts_every", "eval_prompts",
        "max_rows", "cache_gib", "checkpoint_activations", "device", "reward_deadline", "reward_retries",
        "overlap_scoring",
        "request_retries", "request_concurrency", "max_skipped",
        "keep_checkpoints", "eval_every", "env_deadline", "eval_group_size", "eval_reward", "patience", "stop_kl",
    }
)  # fmt: skip
"""Options that do not invalidate a saved state: how long, how often, where, and how much at a time."""

HOW_LONG = frozenset({"steps", "rounds", "epochs", "patience", "stop_kl"})
"""Those that decide when a run ends: a run that ended early continues where one of them changes."""

CONTENT_DECIDES = frozenset(
    {"model", "prompts", "eval_prompts", "pairs", "eval_pairs", "test_pairs", "data", "eval_data", "chat_template"}
)
"""Options that name what a run reads. It may have moved: what it holds is compared, by its fingerprint."""

REWARDS = ("reward", "eval_reward")
"""Options whose values are rewards, which may have moved too."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ; where an input is makes no difference."""
    return sorted(
        name
        for name in old.keys() | new.keys()
        if name not in OF_THE_PROCESS
        and (name not in old or name not in new or _compared(name, old[name]) != _compared(name, new[name]))
    )


def _compared(name: str, value: Any) -> Any:
    """What of an option has to be equal. Of an input it is only whether there is one."""
    if name in CONTENT_DECIDES:
        return value is None
    if name == "env" and isinstance(value, str):
        return placeless_object(value)
    return [placeless(one) for one in value] if name in REWARDS and isinstance(value, list | tuple) else value


def placeless_object(spec: str) -> str:
    """``file.py:name`` without the directory of the file; anything else as it is.

    >>> placeless_object("/home/me/games.py:Chess"), placeless_object("maze:manhattan")
    ('games.py:Chess', 'maze:manhattan')
    """
    file, _, name = spec.rpartition(":")
    return f"{PurePath(file).name}:{name}" if file.endswith(".py") else spec


def placeless(reward: str) -> tuple[str | None, str, float]:
    """Name, reward and weight of a ``--reward`` value, without the directory of its file or model.

    >>> placeless("/home/me/rewards.py:fn=0.5")
    (None, 'rewards.py:fn', 0.5)
    """
    name, rest = split_name(reward)
    spec, weight = split_weight(rest)
    rule, _, argument = spec.partition(":")
    if rule in TAKES_FILE:
        return name, f"{rule}:{PurePath(argument).name}", weight
    if rule in RULES:
        return name, spec, weight
    if is_address(spec):  # a server that moved has another host and port, by which it may be reported
        path = spec.partition("://")[2].partition("/")[2]
        return name, path if name else f"{short_name(spec)}/{path}", weight
    if judge := judge_file(spec):
        return name, f"judge:{PurePath(judge).name}", weight
    return name, placeless_object(spec) if ":" in spec else short_name(spec), weight


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, allowed: frozenset[str]) -> None:
    """Raise :class:`ConfigError` that names the options that differ, unless all are in ``allowed``."""
    found = [name for name in changes(old, new) if name not in allowed]
    if not found:
        return
    message = "the run was made with other options: " + ", ".join(
        f"{name} ({old.get(name)} -> {new.get(name)})" for name in found
    )
    unsafe = [name for name in found if name not in SAFE]
    if unsafe:
        raise ConfigError(message, hint=f"{', '.join(unsafe)} cannot change in a run")
    raise ConfigError(message, hint="resume with the new ones by --allow")


def refuse_other_inputs(
    old: Mapping[str, str], new: Mapping[str, str], *, allowed: frozenset[str], places: Mapping[str, Any]
) -> None:
    """Raise :class:`DataError` where a model or data set has changed since the run began; ``places`` says where each
    of them is now."""
    for name in sorted(old.keys() | new.keys()):
        option = name.partition(" ")[0]  # "eval_reward NAME" is the model NAME of that option
        if option not in allowed and old.get(name) != new.get(name):
            raise DataError(
                f"{name} is not what it was when the run began (fingerprint {old.get(name)}, now {new.get(name)})",
                where=places.get(name) or "",
                hint=f"restore it, {'resume with the new one by --allow, ' * (option in SAFE)}or start a new run",
            )
