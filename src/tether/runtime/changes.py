"""What may differ when a run is resumed, and what may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tether.errors import ConfigError, DataError

OF_THE_PROCESS = frozenset({"out", "overwrite", "quiet", "stop_after"})
"""Options of the process, not of the run."""
SAFE = frozenset(
    {
        "steps", "rounds", "epochs", "save_every", "keep_last", "keep_best", "rollouts_every", "eval_prompts",
        "max_rows", "cache_gib", "checkpoint_activations", "device", "reward_deadline", "reward_retries", "max_skipped",
    }
)  # fmt: skip
"""Options that do not invalidate a saved state: how long, how often, where, and how much at a time."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ."""
    return sorted(
        name
        for name in old.keys() | new.keys()
        if name not in OF_THE_PROCESS and (name not in old or name not in new or old[name] != new[name])
    )


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


def refuse_other_inputs(old: Mapping[str, str], new: Mapping[str, str], *, allowed: frozenset[str]) -> None:
    """Raise :class:`DataError` where a model or data set has changed since the run began."""
    for name in sorted(old.keys() | new.keys()):
        if name not in allowed and old.get(name) != new.get(name):
            raise DataError(
                f"{name} is not what it was when the run began (fingerprint {old.get(name)}, now {new.get(name)})",
                hint="restore it, or start a new run",
            )
