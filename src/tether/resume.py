"""``tether resume DIR``: a training run goes on with the options it had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tether import config as options
from tether.errors import RunError
from tether.flags import flatten, parse
from tether.runtime.changes import SAFE, changes, refuse_changes
from tether.runtime.directory import CONFIG, SUMMARY
from tether.runtime.lock import Lock
from tether.training import Start, train_grpo, train_ppo, train_rejection_sampling, train_reward, train_sft
from tether.untrusted import read_flat_yaml

COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "sft": (options.SFT, train_sft),
    "reward": (options.Reward, train_reward),
    "rejection-sampling": (options.RejectionSampling, train_rejection_sampling),
    "ppo": (options.PPO, train_ppo),
    "grpo": (options.GRPO, train_grpo),
}


def resume(command: options.Resume) -> None:
    """Go on with the run in ``command.directory``."""
    path = Path(command.directory)
    if not (path / CONFIG).is_file():
        raise RunError(
            f"{path}: no run to resume here: {CONFIG} is missing; a run killed in its first step leaves none"
        )
    Lock(path).release()  # to know before everything is loaded; it is taken for good when the run is at work
    saved = read_flat_yaml(path / CONFIG)
    name = str(saved.get("command"))
    if name not in COMMANDS:
        raise RunError(f"{path}: a run of 'tether {name}' cannot be resumed; those of {', '.join(COMMANDS)} can")
    cls, train = COMMANDS[name]
    asked: Any = parse(name, cls, ["--config", str(path / CONFIG), *command.options])
    asked = replace(asked, run=replace(asked.run, out=str(path), overwrite=False))
    new = {"command": name, **flatten(asked)}
    changed = changes(saved, new)
    allowed = SAFE if command.allow else frozenset()
    refuse_changes(saved, new, allowed=allowed)
    if (path / SUMMARY).is_file() and not changed:
        print(f"{path}: the run is finished; there is nothing left to do", file=sys.stderr)
        return
    train(asked, Start(resumed=True, allowed=allowed))
