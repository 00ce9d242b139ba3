"""A Python function as a reward, in TRL's signature.

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called once per step with flat lists, one entry per completion. Conversational prompts arrive as lists of
messages, and their completions as one assistant message; the data's other columns arrive by name. It may be async, may
return None for a completion it does not apply to, and may return a list of floats for a completion: one reward per
token of ``completion_ids``.

It runs in the main thread, because signal handlers need that (math-verify's SIGALRM is one); an async one runs in a
thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.data.tokenise import Text
from tether.errors import RewardError
from tether.rewards.combine import Judgement, RewardValue, require_token_rewards
from tether.rewards.supervision import supervised
from tether.stop_requests import DeadlineError, Interrupted
from tether.types import Completion, Prompt, RolloutGroup
from tether.untrusted import shown


@dataclass(frozen=True)
class FunctionReward:
    """A :class:`tether.rewards.combine.Reward` that calls ``function``.

    A call fails when it raises, takes longer than ``deadline`` seconds (None for no limit), or returns something that
    cannot be a reward. It is then repeated up to ``retries`` times, so the function must be safe to call twice.
    """

    name: str
    function: Callable[..., Any]
    deadline: float | None = None
    retries: int = 0

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        flat = [(group.prompt, completion) for group in groups for completion in group.completions]
        rows = iter(supervised(self.name, lambda: self._call(flat), deadline=self.deadline, retries=self.retries))
        return [[Judgement(next(rows)) for _ in group.completions] for group in groups]

    def _call(self, flat: Sequence[tuple[Prompt, Completion]]) -> list[RewardValue]:
        """One call, with new lists, which the function may change."""
        arguments = {
            **_columns([prompt for prompt, _ in flat]),
            "prompts": [list(p.messages) if p.messages else p.text for p, _ in flat],
            "completions": [as_given(p, c) for p, c in flat],
            "completion_ids": [list(c.ids) for _, c in flat],
        }
        try:
            returned = self.function(**_accepted(self.function, arguments))
            if inspect.isawaitable(returned):
                returned = _awaited(returned)
            return self._check(returned, [completion for _, completion in flat])
        except (RewardError, DeadlineError, Interrupted, KeyboardInterrupt):  # a RewardError already says what is wrong
            raise
        except BaseException as error:  # SystemExit and a panic of Rust code too: one line, with the cause chained
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {shown(error, str)}{_place(error)}"
            ) from error

    def _check(self, returned: Any, completions: Sequence[Completion]) -> list[RewardValue]:
        try:
            rows = iter(returned)
        except TypeError:
            raise RewardError(
                f"reward {self.name!r} must return a list of values; it returned {type(returned).__name__}"
            ) from None
        values = list(itertools.islice(rows, len(completions) + 1))  # a generator may never end
        if len(values) != len(completions):
            count = len(values) if len(values) < len(completions) else f"more than {len(completions)}"
            raise RewardError(f"reward {self.name!r} returned {count} values for {len(completions)} completions")
        return [
            self._value(value, i, completion)
            for i, (value, completion) in enumerate(zip(values, completions, strict=True))
        ]

    def _value(self, value: Any, index: int, completion: Completion) -> RewardValue:
        if value is None:
            return None
        if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
            value = value.tolist()
        if isinstance(value, list | tuple):
            token_rewards = tuple(self._number(v, index) for v in value)
            require_token_rewards(self.name, token_rewards, completion, f"completion {index}")
            return token_rewards
        return self._number(value, index)

    def _number(self, value: Any, index: int) -> float:
        if not isinstance(value, int | float):
            raise RewardError(
                f"reward {self.name!r} returned {shown(value)} for completion {index}",
                hint="it must be a number or None",
            )
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(
                f"reward {self.name!r} returned {shown(value)} for completion {index}", hint="a reward must be finite"
            )
        return number


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns that every prompt has, as lists with one entry per completion."""
    shared = set.intersection(*(set(prompt.columns) for prompt in prompts))
    return {name: [prompt.columns[name] for prompt in prompts] for name in sorted(shared)}


def as_given(prompt: Prompt, completion: Completion) -> Text:
    """The completion in the form of its prompt: text, or the assistant's turn."""
    return [{"role": "assistant", "content": completion.text}] if prompt.messages else completion.text


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The ``arguments`` that the function takes: all of them when it has ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def _awaited(awaitable: Any) -> Any:
    """The result of ``awaitable``. It runs in a thread of its own: in a notebook this thread already has a loop.

    A deadline or a request to stop cancels it and does not wait for it. The thread is a daemon, so that a call that
    hangs does not keep the process from ending.
    """
    outcome: Future[Any] = Future()
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # sets no loop for this thread
    loop = runner.get_loop()

    def run() -> None:
        try:
            with runner:
                result = runner.run(_wait(awaitable))
        except BaseException as error:  # raised by the caller
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result()
    finally:
        if not outcome.done():
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                loop.call_soon_threadsafe(cancel)


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def _place(error: BaseException) -> str:
    """The innermost line of code that ``error`` came through, in brackets, import machinery excluded."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def load_function(spec: str, *, deadline: float | None = None, retries: int = 0) -> FunctionReward:
    """The function behind ``path/to/file.py:name`` or ``package.module:name``, with this ``deadline`` and ``retries``.

    The file may import its neighbours, and a module may be in the working directory: both directories are appended to
    ``sys.path``. Raises :class:`RewardError`.
    """
    source, _, name = spec.rpartition(":")
    try:
        if source.endswith(".py"):
            module = _module_from_file(Path(source))
        else:
            _join_path(Path.cwd())
            module = importlib.import_module(source)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # importing runs user code, which may be a script
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            raise RewardError(
                f"no built-in reward has this name, and there is no module {source!r} to take {name!r} from", where=spec
            ) from error
        raise RewardError(
            f"importing it raised {type(error).__name__}: {shown(error, str)}{_place(error)}", where=spec
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise RewardError(
            f"{source} has no function {name!r}", where=spec, hint=f"it has {', '.join(names) or 'no functions'}"
        )
    return FunctionReward(name, function, deadline, retries)


def _join_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _module_from_file(path: Path) -> Any:
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        raise RewardError("no such file to take a reward function from", where=path)
    spec = importlib.util.spec_from_file_location(f"tether_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    _join_path(path.parent.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
