"""A training command as a function: ``tether.grpo.run(model=..., prompts=[...], rewards=[...], kl_coef=0.1)``."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from tether.api.arguments import describe, filled, named_as_arguments, require_known
from tether.api.directory import CallDirectory
from tether.api.optimizers import factory_of
from tether.api.parameters import COLUMNS, EXTRAS, REWARDS, located, parameters
from tether.api.result import Run
from tether.api.rewards import name_of, rewards_of
from tether.commands import TABLE, Command, find
from tether.data.memory import Rows, source_of
from tether.errors import ConfigError, ModelError, RunError
from tether.flags import Option, options_of, read_yaml
from tether.models.saving import save_model
from tether.observers import Hook, Monitor
from tether.resume import at_its_place, given_in_python, saved_run, start_of
from tether.runtime.changes import SAFE
from tether.runtime.directory import CONFIG, begun_with
from tether.stop_requests import survivable
from tether.training.common import Start
from tether.training.given import OPTIMIZER, Given, described


def runner(name: str, module: str) -> Callable[..., Run]:
    """The function ``run`` of the public ``module`` for the command ``name``, with the options as keyword arguments."""
    command = find(name, TABLE)
    assert command is not None, name
    row: Command = command

    def run(**arguments: Any) -> Run:
        return run_command(row, arguments)

    run.__module__, run.__qualname__ = module, "run"
    cls = row.options_class()
    doc = (
        f"{inspect.getdoc(cls)}\n\nThe options are those of ``tether {name}``, by keyword. Returns a "
        ":class:`tether.Run`. Raises\n:class:`tether.TetherError` where an argument cannot work, and "
        ":class:`tether.Interrupted` where the run was\nasked to stop: the same call with ``resume=True`` continues it."
    )
    describe(run, parameters(cls), doc=doc, returns=Run)
    return run


@dataclass
class Call:
    """The arguments of one call, on their way to the options of a command."""

    row: Command
    arguments: dict[str, Any]
    scratch: Path
    """For a model in memory; removed when the call is over."""
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    rewards: dict[str, Any] = field(default_factory=dict)
    environments: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)

    def take_options(self) -> None:
        """Fill ``values`` from the arguments, and set the Python objects aside."""
        for name, value in self.arguments.items():
            option = next((key for key, here in REWARDS.items() if here == name), name)
            if value is None:
                if option == name:
                    self.values[name] = None
            elif name == "model":
                self.values[name] = self._model(value)
            elif name in COLUMNS:
                self.values[name] = self._source(name, value)
            elif name == "env" and callable(value):
                self.values[name] = described(f"env {name_of(value)}")
                self.environments[self.values[name]] = value
            elif option != name:
                found = rewards_of(value, argument=name)
                self.rewards.update(found.objects)
                self.values[option] = found.specs
            elif name not in {one.name for one in EXTRAS}:
                self.values[name] = value

    def _source(self, name: str, value: Any) -> str:
        text, turns = COLUMNS[name]
        source = source_of(value, name=name, text_column=text, turns_column=turns)
        if isinstance(source, str):
            return source
        self.rows[described(name)] = source
        return described(name)

    def _model(self, value: Any) -> str:
        """Where the model is: one in memory is written down, so that it is checked and loaded like any other, and the
        one that was given stays as it is."""
        tokenizer = self.arguments.get("tokenizer")
        found = located(value, tokenizer, argument="model")
        if isinstance(found, str):
            if tokenizer is not None and not isinstance(value, Run):
                raise ConfigError("is for a model in memory", where="tokenizer", hint="leave it out")
            return found
        directory = self.scratch / "model"
        save_model(*found, directory)
        self.shown["model"] = described("model")
        return str(directory)

    @property
    def hooks(self) -> list[Hook]:
        return several(self.arguments.get("on_step"), callable, name="on_step", what="a function")

    @property
    def monitors(self) -> list[Monitor]:
        return several(self.arguments.get("monitors"), is_monitor, name="monitors", what="a monitor")

    def given(self) -> Given:
        """The Python objects."""
        own = self.arguments.get(OPTIMIZER)
        optimizer, name = factory_of(own) if own is not None else (None, "")
        return Given(
            rows=self.rows,
            rewards=self.rewards,
            environments=self.environments,
            shown=self.shown,
            optimizer=optimizer,
            optimizer_name=name,
        )


def is_monitor(value: Any) -> bool:
    return callable(getattr(value, "watch", None))


def several(value: Any, fits: Callable[[Any], bool], *, name: str, what: str) -> list[Any]:
    """An argument that is one object or a list of them. Raises :class:`ConfigError` where one does not fit."""
    if value is None:
        return []
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in found:
        if not fits(one):
            raise ConfigError(f"found {one!r}", where=name, hint=f"give {what}, or a list of such")
    return found


def run_command(row: Command, arguments: Mapping[str, Any]) -> Run:
    """Run the training command ``row`` with the keyword ``arguments``."""
    cls = row.options_class()
    options = list(options_of(cls))
    known = [one.name for one in parameters(cls)]
    require_known(list(arguments), known, REWARDS)
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "a run needs the main thread: interrupts, and the time limit of rewards, reach no other",
            hint="call it from there, or start 'tether' as a process of its own",
        )
    directory = CallDirectory(arguments)
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory)
        stack.enter_context(named_as_arguments(options, REWARDS, again=directory.again))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tether-model-"))
        call = Call(row, {**arguments, "out": str(directory.path)}, Path(scratch))
        with locating(scratch):
            train(call, cls, options)
        return directory.result()


def train(call: Call, cls: type, options: Sequence[Option]) -> None:
    """Begin the run of a call, or resume it."""
    call.take_options()
    given, path = call.given(), Path(call.values["out"])
    saved: dict[str, Any] = {}
    if call.arguments.get("resume"):
        made_by, saved = saved_run(path, TABLE)
        if made_by.name != call.row.name:
            raise RunError(f"is a run of 'tether {made_by.name}', and this is {call.row.name}", where=path)
        require_objects(path, saved, call)
        values = {**read_yaml(str(path / CONFIG), made_by.name, options), **call.values}
    else:
        values = call.values
    needed = [one.name for one in options if one.default is MISSING and values.get(one.name) is None]
    if needed:
        raise ConfigError(f"missing: {', '.join(REWARDS.get(name, name) for name in needed)}")
    asked: Any = filled(cls, options, values)
    start: Start | None = Start(given=given)
    if saved:
        allowed = SAFE if call.arguments.get("allow") else frozenset()
        asked = at_its_place(asked, path)
        start = start_of(path, asked, saved, allowed=allowed, given=given)
    if start is None:
        return
    with survivable():
        call.row.function()(asked, start=start, hooks=call.hooks, monitors=call.monitors)


def require_objects(path: Path, saved: Mapping[str, Any], call: Call) -> None:
    """Raise :class:`ConfigError` where the run in ``path`` was given a Python object that this call lacks."""
    lacking = [name for name in given_in_python(path, saved) if name != OPTIMIZER and call.values.get(name) is None]
    began_with = begun_with(path).get(OPTIMIZER, "")
    name = call.given().optimizer_name
    if lacking:
        raise ConfigError(
            f"{', '.join(REWARDS.get(one, one) for one in lacking)} of the run were given in Python",
            where=path,
            hint="give them again",
        )
    if began_with != name:
        raise ConfigError(
            f"the run was begun with {began_with or 'AdamW'}, and this is {name or 'AdamW'}", where=OPTIMIZER
        )


@contextlib.contextmanager
def locating(scratch: str) -> Iterator[None]:
    """Errors about a model in memory do not name the directory that it was written into."""
    try:
        yield
    except ModelError as error:
        error.where = "model" if error.where.startswith(scratch) else error.where
        raise
