"""A Python function as a reward, in TRL's signature.

    def my_reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called once per step with flat lists, one entry per completion. Conversational prompts arrive as lists of
messages, and their completions as one assistant message; the data's other columns arrive by name, with None for rows
that lack one, and what TRL gives besides (:mod:`tether.rewards.logged`). It may be async, may return None for a
completion it does not apply to, and may return a list of floats for a completion: one reward per token of
``completion_ids``.

It runs in the main thread, because signal handlers need that (math-verify's SIGALRM is one); an async one runs in the
event loop that all async rewards share (:mod:`tether.event_loop`), at the same time as the others
(:mod:`tether.rewards.waiting`). What it sets for the whole process is undone after it (:mod:`tether.rewards.process`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.data.tokenise import Text
from tether.errors import RewardError
from tether.event_loop import awaited
from tether.rewards.combine import Judgement, RewardValue, flattened, regrouped, require_token_rewards
from tether.rewards.logged import NAMES, Logged
from tether.rewards.process import Apart
from tether.rewards.rules import ExactAnswer
from tether.rewards.supervision import supervised
from tether.rewards.waiting import Waiting, together
from tether.stop_requests import DeadlineError, Interrupted
from tether.types import Completion, Prompt, RolloutGroup
from tether.untrusted import shown

GIVEN = ("prompts", "completions", "completion_ids", *NAMES)
"""The parameters of a reward function that are no columns of the data."""


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
    apart: Apart = field(default_factory=Apart, compare=False)
    """What the function sets for the whole process, in force while it runs."""
    columns: frozenset[str] = frozenset()
    """Columns that the data set has: they are given in a step whose prompts lack them too, as None for each."""

    @property
    def needs(self) -> frozenset[str]:
        """The columns without which ``function`` cannot be called: its parameters without default, or what it says
        itself (:class:`tether.rewards.rules.ExactAnswer`)."""
        if isinstance(self.function, ExactAnswer):
            return frozenset([self.function.column])
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some built-in functions have no signature
            return frozenset()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        required = {p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty}
        return frozenset(required - set(GIVEN))

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        waiting = self.waiting(groups)
        if waiting is not None:
            return together([waiting])[0]
        flat = flattened(groups)
        with self.apart.inside():
            found = supervised(self.name, lambda: self._call(flat), deadline=self.deadline, retries=self.retries)
        return regrouped(found, groups)

    def waiting(self, groups: Sequence[RolloutGroup]) -> Waiting[list[list[Judgement]]] | None:
        """The call of an async function; None for any other."""
        if not is_async(self.function):
            return None
        flat = flattened(groups)

        async def start() -> list[list[Judgement]]:
            return regrouped(await self._call_async(flat), groups)

        return Waiting(name=self.name, start=start, deadline=self.deadline, retries=self.retries, apart=self.apart)

    def _call(self, flat: Sequence[tuple[Prompt, Completion]]) -> list[Judgement]:
        """One call, with new lists, which the function may change."""
        logged = Logged(self.name, len(flat))
        with self._as_failures():
            returned = self.function(**self._arguments(flat, logged))
            if inspect.isawaitable(returned):
                returned = awaited(returned)
            return self._judgements(returned, flat, logged)

    async def _call_async(self, flat: Sequence[tuple[Prompt, Completion]]) -> list[Judgement]:
        """The same for an async function, in the event loop."""
        logged = Logged(self.name, len(flat))
        with self._as_failures():
            returned = await self.function(**self._arguments(flat, logged))
            return self._judgements(returned, flat, logged)

    def _arguments(self, flat: Sequence[tuple[Prompt, Completion]], logged: Logged) -> dict[str, Any]:
        """What the function is given, by name."""
        arguments = {
            **_columns([prompt for prompt, _ in flat], self.columns),
            "prompts": [list(p.messages) if p.messages else p.text for p, _ in flat],
            "completions": [as_given(p, c) for p, c in flat],
            "completion_ids": [list(c.ids) for _, c in flat],
            **logged.arguments(),
        }
        return accepted(self.function, arguments)

    @contextlib.contextmanager
    def _as_failures(self) -> Iterator[None]:
        """What the function raises in the block becomes a :class:`RewardError`, but for requests to stop."""
        try:
            yield
        except (RewardError, DeadlineError, Interrupted, KeyboardInterrupt):  # a RewardError already says what is wrong
            raise
        except BaseException as error:  # SystemExit and a panic of Rust code too: one line, with the cause chained
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {shown(error, str)}{place_of(error)}"
            ) from error

    def _judgements(self, returned: Any, flat: Sequence[tuple[Prompt, Completion]], logged: Logged) -> list[Judgement]:
        values = self._check(returned, [completion for _, completion in flat])
        metrics = logged.of_call()
        return [Judgement(value, logged=metrics, extra=logged.of_completion(i)) for i, value in enumerate(values)]

    def _check(self, returned: Any, completions: Sequence[Completion]) -> list[RewardValue]:
        try:
            if isinstance(returned, Mapping | Set | str | bytes | bytearray) or _is_table(returned):
                raise TypeError("its items are no rewards")
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


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of ``function`` gives a coroutine: ``async def``, in an object or partly applied too."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _columns(prompts: Sequence[Prompt], known: Iterable[str]) -> dict[str, list[Any]]:
    """The ``known`` columns and those that any prompt has, as lists with one entry per completion: None where its
    prompt lacks the column."""
    names = set(known).union(*(prompt.columns for prompt in prompts))
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}


def _is_table(value: Any) -> bool:
    """Whether ``value`` is keyed and no row of numbers: iterating over it gives its keys."""
    return hasattr(value, "keys") and not hasattr(value, "tolist")


def as_given(prompt: Prompt, completion: Completion) -> Text:
    """The completion in the form of its prompt: text, or the assistant's turn; of an episode, all of its turns."""
    if completion.messages is not None:
        return list(completion.messages)
    return [{"role": "assistant", "content": completion.text}] if prompt.messages else completion.text


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The ``arguments`` that the function takes: all of them when it has ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def place_of(error: BaseException) -> str:
    """The innermost line of code that ``error`` came through, in brackets, import machinery excluded."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
