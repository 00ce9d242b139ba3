"""``tether resume DIR``: continue a training run with the options it had."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tether.commands import Table, find
from tether.errors import RunError
from tether.flags import POSITIONAL, REST, as_flag, flatten, parse
from tether.runtime.changes import CONTENT_DECIDES, SAFE, changes, refuse_changes
from tether.runtime.directory import CONFIG, FORMAT, SUMMARY
from tether.runtime.lock import Lock
from tether.training.common import Start
from tether.training.inputs import here, located
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
    path, base = Path(command.directory), here()
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
    new = {"command": name, **located(flatten(asked), base)}
    changed = changes(saved, new)
    allowed = SAFE if command.allow else frozenset()
    refuse_changes(saved, new, allowed=allowed)
    again = changed or any(saved.get(option) != new.get(option) for option in allowed)
    if (path / SUMMARY).is_file() and not again:
        print(f"{path}: the run is finished; there is nothing left to do", file=sys.stderr)
        return
    require_inputs(new)
    made_by.function()(asked, start=Start(resumed=True, allowed=allowed))


def require_inputs(options: Mapping[str, Any]) -> None:
    """Raise :class:`RunError` where an input of the run is no longer where it was; ``options`` have absolute paths."""
    for name in sorted(CONTENT_DECIDES & options.keys()):
        value = options[name]
        if value is None or not Path(value).is_absolute():
            continue
        if not Path(value).exists() and not Path(value.partition(":")[0]).is_dir():  # a data set may name a split
            raise RunError(
                "does not exist any more, and the run was made with it",
                where=value,
                hint=f"if it has moved, resume with {as_flag(name)} and its new place",
            )
