"""``tether resume DIR``: continue a training run with the options it had."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tether.commands import Command, Table, find
from tether.errors import RunError
from tether.flags import POSITIONAL, REST, as_flag, flatten, parse
from tether.runtime.changes import CONTENT_DECIDES, SAFE, changes, refuse_changes
from tether.runtime.checkpoint import DIRECTORY, remove_checkpoints
from tether.runtime.directory import CONFIG, FORMAT, SUMMARY, begun_with
from tether.runtime.lock import Lock
from tether.training.common import Start
from tether.training.given import NOTHING, OPTIMIZER, Given, is_described
from tether.training.inputs import here, located
from tether.untrusted import read_flat_yaml

NAMED = 5
"""Runs that an error names."""


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
    made_by, saved = saved_run(path, table)
    if objects := given_in_python(path, saved):
        raise RunError(
            f"{' and '.join(objects)} of the run were given in Python",
            where=path,
            hint="resume it from there: the call that began it, with resume=True",
        )
    asked = parse(made_by.name, made_by.options_class(), ["--config", str(path / CONFIG), *command.options])
    asked = at_its_place(asked, path)
    start = start_of(path, asked, saved, allowed=SAFE if command.allow else frozenset())
    if start is not None:
        made_by.function()(asked, start=start)


def saved_run(path: Path, table: Table) -> tuple[Command, dict[str, Any]]:
    """The command that made the run in ``path``, and the options that the run has. Raises :class:`RunError` where there
    is none that can be resumed."""
    require_run(path)
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
    return made_by, saved


def at_its_place(asked: Any, path: Path) -> Any:
    """The options of a run that is in ``path``."""
    return replace(asked, run=replace(asked.run, out=str(path), overwrite=False))


def start_of(
    path: Path, asked: Any, saved: Mapping[str, Any], *, allowed: frozenset[str], given: Given = NOTHING
) -> Start | None:
    """How the run in ``path``, which had the options ``saved``, resumes with those that are ``asked`` for; None where
    it is finished, and nothing is left to do."""
    new = {"command": saved["command"], **located(flatten(asked), here()), **given.shown}
    changed = changes(saved, new)
    refuse_changes(saved, new, allowed=allowed)
    again = changed or any(saved.get(option) != new.get(option) for option in allowed)
    if (path / SUMMARY).is_file() and not again:
        if not asked.run.keep_checkpoints and (path / DIRECTORY).is_dir():  # it was killed while it removed them
            lock = Lock(path)
            try:
                remove_checkpoints(path)
            finally:
                lock.release()
        print(
            f"{path}: the run is finished, there is nothing left to do; its model is {path / 'model'}", file=sys.stderr
        )
        return None
    require_inputs(new)
    return Start(resumed=True, allowed=allowed, given=given)


def given_in_python(path: Path, saved: Mapping[str, Any]) -> list[str]:
    """The options of a run that were Python objects."""
    found = [name for name, value in saved.items() if is_described(value)]
    return [*found, *([OPTIMIZER] if OPTIMIZER in begun_with(path) else [])]


def require_run(path: Path) -> None:
    """Raise :class:`RunError` unless ``path`` is a run directory."""
    if not path.exists():
        raise RunError("no such directory", where=path, hint="give the directory that --out named")
    if not path.is_dir():
        raise RunError("a file, and a run is a directory", where=path, hint="give the directory that --out named")
    if (path / CONFIG).is_file():
        return
    runs = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
    hint = f"it holds runs: {', '.join(runs[:NAMED])}{', ...' if len(runs) > NAMED else ''}"
    raise RunError(
        f"no run to resume: {CONFIG} is missing",
        where=path,
        hint=hint if runs else "a run that ended before its first step leaves none; give its command again",
    )


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
