"""A Python function as a reward, in TRL's signature.

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called once a step with flat lists, one entry a completion. Conversational prompts arrive as lists of messages,
and their completions as one assistant message; the data's other columns arrive by name. It may be async, may return
None for a completion it does not apply to, and may return a list of floats for a completion: one reward a token.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.data.tokenise import Text
from tether.errors import RewardError
from tether.rewards.combine import RewardValue
from tether.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True)
class FunctionReward:
    """A :class:`tether.rewards.combine.Reward` that calls ``function``."""

    name: str
    function: Callable[..., Any]

    def values(self, groups: Sequence[RolloutGroup]) -> list[list[RewardValue]]:
        flat = [(group.prompt, completion) for group in groups for completion in group.completions]
        arguments = {
            **_columns([prompt for prompt, _ in flat]),
            "prompts": [list(p.messages) if p.messages else p.text for p, _ in flat],
            "completions": [as_given(p, c) for p, c in flat],
            "completion_ids": [list(c.ids) for _, c in flat],
        }
        try:
            returned = self.function(**_accepted(self.function, arguments))
            if inspect.isawaitable(returned):
                with ThreadPoolExecutor(1) as thread:  # its own thread: in a notebook this one has a loop already
                    returned = thread.submit(asyncio.run, _wait(returned)).result()
        except RewardError:  # a rule that says itself what is wrong
            raise
        except Exception as error:  # whatever the person's function raises becomes one line, with the cause chained
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}{_place(error)}") from error
        checked = self._check(returned, [completion for _, completion in flat])
        rows = iter(checked)
        return [[next(rows) for _ in group.completions] for group in groups]

    def _check(self, returned: Any, completions: Sequence[Completion]) -> list[RewardValue]:
        try:
            values = list(returned)
        except TypeError:
            raise RewardError(
                f"reward {self.name!r} must return a list of values; it returned {type(returned).__name__}"
            ) from None
        if len(values) != len(completions):
            raise RewardError(f"reward {self.name!r} returned {len(values)} values for {len(completions)} completions")
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
            if len(value) != len(completion.ids):
                raise RewardError(
                    f"reward {self.name!r} returned {len(value)} token rewards for completion {index}, "
                    f"which has {len(completion.ids)} tokens"
                )
            return tuple(self._number(v, index) for v in value)
        return self._number(value, index)

    def _number(self, value: Any, index: int) -> float:
        if not isinstance(value, int | float):
            raise RewardError(
                f"reward {self.name!r} returned {value!r} for completion {index}; it must be a number or None"
            )
        if not math.isfinite(value):
            raise RewardError(f"reward {self.name!r} returned {value} for completion {index}; a reward must be finite")
        return float(value)


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns that every prompt has, as lists over the completions."""
    shared = set.intersection(*(set(prompt.columns) for prompt in prompts))
    return {name: [prompt.columns[name] for prompt in prompts] for name in sorted(shared)}


def as_given(prompt: Prompt, completion: Completion) -> Text:
    """The completion in the form of its prompt: text, or the assistant's turn."""
    return [{"role": "assistant", "content": completion.text}] if prompt.messages else completion.text


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that the function takes: all of them when it has ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return arguments
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def _place(error: BaseException) -> str:
    """The innermost line of code that ``error`` came through, in brackets; import's own machinery does not count."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def load_function(spec: str) -> FunctionReward:
    """The function behind ``path/to/file.py:name`` or ``package.module:name``.

    The file may import its neighbours, and a module may lie in the working directory: both join the end of the path.
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
    except Exception as error:  # importing runs the person's code
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            raise RewardError(
                f"{spec}: no built-in reward has this name, and there is no module {source!r} to take {name!r} from"
            ) from error
        raise RewardError(f"{spec}: importing it raised {type(error).__name__}: {error}{_place(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise RewardError(f"{spec}: {source} has no function {name!r}; it has {', '.join(names) or 'no functions'}")
    return FunctionReward(name, function)


def _join_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise RewardError(f"{path}: no such file to take a reward function from")
    spec = importlib.util.spec_from_file_location(f"tether_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    _join_path(path.parent.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
