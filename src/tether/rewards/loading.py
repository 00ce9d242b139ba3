"""Reward functions, and other objects, from files and modules.

A file is imported once, however many of its functions are rewards, and under a name by which worker processes find it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from tether.errors import RewardError
from tether.rewards.function import FunctionReward, place_of
from tether.rewards.process import Apart
from tether.rewards.rules import rules_like
from tether.untrusted import shown


@dataclass(frozen=True)
class Source:
    """A file or module with reward functions."""

    module: ModuleType
    apart: Apart
    """What its code sets for the whole process."""


@dataclass
class Sources:
    """The sources of a run's rewards, each imported once. Relative paths are those of ``directory``."""

    directory: Path = field(default_factory=Path.cwd)
    found: dict[str, Source] = field(default_factory=dict)

    def source(self, name: str) -> Source:
        """``path/to/file.py`` or ``package.module``, imported where it is not yet."""
        path = Path(os.path.abspath(self.directory / name)) if name.endswith(".py") else None
        key = str(path or name)
        if key not in self.found:
            apart = Apart()
            with apart.inside():
                if path is None:
                    _join_path(self.directory)
                    module = importlib.import_module(name)
                else:
                    module = _module_from_file(path, name)
            self.found[key] = Source(module, apart)
        return self.found[key]


def load_function(
    spec: str, *, deadline: float | None = None, retries: int = 0, sources: Sources | None = None
) -> FunctionReward:
    """The function behind ``path/to/file.py:name`` or ``package.module:name``, with this ``deadline`` and ``retries``.

    The file may import its neighbours, and a module may be in the working directory: both directories are appended to
    ``sys.path``. ``sources`` holds what is imported already. Raises :class:`RewardError`.
    """
    source, _, name = spec.rpartition(":")
    loaded = load_source(spec, sources or Sources(), kind="rule", known=rules_like(source))
    function = getattr(loaded.module, name, None)
    if not callable(function):
        names = [n for n, v in vars(loaded.module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise RewardError(
            f"{source} has no function {name!r}", where=spec, hint=f"it has {', '.join(names) or 'no functions'}"
        )
    return FunctionReward(name, function, deadline, retries, loaded.apart)


def load_source(spec: str, sources: Sources, *, kind: str, known: str) -> Source:
    """The file or the module of ``spec``, ``SOURCE:NAME``. Where there is none, the :class:`RewardError` says that no
    ``kind`` has this name, and which are ``known``."""
    source, _, name = spec.rpartition(":")
    try:
        return sources.source(source)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # importing runs user code, which may be a script
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            raise RewardError(
                f"no {kind} has this name, and there is no module {source!r} to take {name!r} from",
                where=spec,
                hint=known,
            ) from error
        raise RewardError(
            f"importing it raised {type(error).__name__}: {shown(error, str)}{place_of(error)}", where=spec
        ) from error


def _join_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _module_from_file(path: Path, given: str) -> ModuleType:
    """The file as a module; a worker process imports it by the module's name."""
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        raise RewardError("no such file to import", where=given)
    _join_path(path.parent)
    spec = importlib.util.spec_from_file_location(importable_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        if before is not None:
            sys.modules[spec.name] = before
        raise
    return module


def importable_name(path: Path) -> str:
    """The name that imports the file in this process and in those it starts, which have its ``sys.path``; one that
    nothing else has where another module has the file's name."""
    name = path.stem
    found = None if name in sys.builtin_module_names else PathFinder.find_spec(name)
    mine = found is not None and found.origin is not None and os.path.samefile(found.origin, path)
    there = sys.modules.get(name)
    file = getattr(there, "__file__", None)
    taken = there is not None and not (file and os.path.exists(file) and os.path.samefile(file, path))
    return name if mine and not taken else f"tether_reward_{name}"
