"""``tether resume DIR``: continue a training run with the options it had."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tether.commands import Table, find
from tether.errors import RunError
from tether.flags import POSITIONAL, REST, flatten, parse
from tether.runtime.changes import SAFE, changes, refuse_changes
from tether.runtime.directory import CONFIG, FORMAT, SUMMARY
from tether.runtime.lock import Lock
from tether.training.common import Start
from tether.untrusted import read_flat_yaml


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Resume a training run that was interrupted; its numbers are those of an uninterrupted run."""

    directory: str = field(metadata={POSITIONAL: "DIRECTORY"})
    """Run directory; options of the run's own command may follow it."""
    allow: bool = False
    """Accept options that differ from the run's where a change is safe, such as steps."""
    options: tuple[str, ...] = field(default=(), metadata={REST: True})
    """Options of the run's own command, as they were given."""


def resume(command: Resume, *, table: Table) -> None:
    """Resume the run in ``command.directory``, whose command is in ``table``."""
    path = Path(command.directory)
    if not (path / CONFIG).is_file():
        raise RunError(
            f"no run to resume here: {CONFIG} is missing", where=path, hint="a run killed in its first step leaves none"
        )
    Lock(path).release()  # fails early if the run is in use; the run itself takes the lock again
    saved = read_flat_yaml(path / CONFIG)
    if (found := saved.pop("format", 1)) != FORMAT:
        raise RunError(
            f"made by another version of tether (format {found}; this one resumes format {FORMAT})",
            where=path,
            hint="begin a new run",
        )
    name = str(saved.get("command"))
    made_by = find(name, table)
    if made_by is None or not made_by.resumable:
        others = ", ".join(one.name for one in table if one.resumable)
        raise RunError(f"a run of 'tether {name}' cannot be resumed; those of {others} can", where=path)
    asked: Any = parse(name, made_by.options_class(), ["--config", str(path / CONFIG), *command.options])
    asked = replace(asked, run=replace(asked.run, out=str(path), overwrite=False))
    new = {"command": name, **flatten(asked)}
    changed = changes(saved, new)
    allowed = SAFE if command.allow else frozenset()
    refuse_changes(saved, new, allowed=allowed)
    if (path / SUMMARY).is_file() and not changed:
        print(f"{path}: the run is finished; there is nothing left to do", file=sys.stderr)
        return
    made_by.function()(asked, start=Start(resumed=True, allowed=allowed))
