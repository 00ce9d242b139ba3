"""Completions of several turns: the policy says something, its environment answers, and so on until the episode ends.

An episode is one completion. The tokens of the environment lie between those of the policy's turns, with a mask of
False; the completion ends with a token of the policy. What ends a turn is what ends a completion elsewhere: an
end-of-sequence token, a stop string, or a limit.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.conversations import is_conversation, read_turns, template_of
from tether.data.encoding import Encoder
from tether.data.reading import RowError
from tether.data.tokenise import following_ids, write_observation, write_prompt
from tether.errors import EpisodeError
from tether.event_loop import awaited
from tether.generation.environment import Environment, Observation
from tether.generation.stopping import Ending, text_of
from tether.seeds import derive_seed
from tether.stop_requests import check
from tether.types import FinishReason, Message, Prompt, Request, Turn
from tether.untrusted import shown

AT_ONCE = 64
"""Calls of environments at one time."""
PATIENCE = 0.005
"""Seconds in which most environments answer: rows that wait no longer stay in their batch."""
GLANCE = 0.1
"""Seconds between two looks at a request to stop while all episodes wait."""
KEPT_TEXTS = 4096
"""Texts of environments whose ids are kept."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """An environment, and the limits of its episodes."""

    make: Callable[[], Environment]
    """Makes the environment of one episode."""
    name: str = "env"
    max_turns: int = 16
    """Turns of the policy."""
    turn_tokens: int | None = None
    """Tokens of one turn; None for as many as the completion may still have."""
    deadline: float = 60.0
    """Seconds in which the environment has to answer; it has failed where it does not."""
    seconds: float | None = None
    """Time limit of an episode, after which it ends with the present turn; None for none."""

    def begin(
        self, requests: Sequence[Request], tokenizer: PreTrainedTokenizerBase, ending: Ending
    ) -> list[list[Episode]]:
        """New episodes of each request, whose prompts hold what the reset of their environments shows.

        Raises :class:`EpisodeError` where a reset fails, or shows something else to the episodes of one group.
        """
        with Calls(self) as calls:
            asked = [
                [(environment := self.made(), calls.ask(self._reset, environment, request)) for _ in request.seeds]
                for request in requests
            ]
            calls.wait([answer for group in asked for _, answer in group])
        # many environments show few texts, each of them often
        encode = lru_cache(maxsize=KEPT_TEXTS)(lambda text: tuple(following_ids(tokenizer, text)))
        found = []
        for request, group in zip(requests, asked, strict=True):
            texts = [answer.result().text for _, answer in group]
            if any(text != texts[0] for text in texts):
                raise EpisodeError(
                    "a reset with the same prompt and seed showed something else",
                    where=self.name,
                    hint="draw what is random from the seed",
                )
            if any(answer.result().done for _, answer in group):
                raise EpisodeError("the episode is over before its first turn", where=self.name)
            prompt = extended(request.prompt, texts[0], tokenizer, where=self.name) if texts else request.prompt
            found.append([Episode(environment, prompt, tokenizer, ending, self, encode) for environment, _ in group])
        return found

    def made(self) -> Environment:
        """A new environment."""
        try:
            return self.make()
        except Exception as error:
            raise failed(self.name, "could not be made", error) from error

    def _reset(self, environment: Environment, request: Request) -> Any:
        return environment.reset(request.prompt, seed=derive_seed(request.seeds[0], "episode"))


class Episode:
    """An episode in progress. ``ids`` and ``mask`` are those of its completion."""

    def __init__(
        self,
        environment: Environment,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        ending: Ending,
        episodes: Episodes,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        """``encode`` gives the ids of a text that is shown."""
        self.encode = encode
        self.environment, self.prompt, self.tokenizer, self.ending = environment, prompt, tokenizer, ending
        self.limits, self.longest = episodes, ending.sampling.max_new_tokens
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.turns: list[Turn] = []
        self.messages: list[Message] = []
        self.start = 0
        """Index of the first token of the present turn."""
        self.finish: FinishReason | None = None
        """Why it is over."""
        self.began = time.monotonic()

    def emitted(self, token: int) -> bool:
        """Take a token of the policy, and say whether its turn is over."""
        self.ids.append(token)
        self.mask.append(True)
        turn = self.ids[self.start :]
        after = (*self.prompt.ids, *self.ids[: self.start]) if self.ending.sampling.stop else ()
        at_limit = len(turn) == self.limits.turn_tokens or len(self.ids) == self.longest
        return at_limit or self.ending.reason(turn, after=after) is not None

    @property
    def action(self) -> str:
        """The text of the present turn."""
        return text_of(self.tokenizer, self.ids[self.start :], after=(*self.prompt.ids, *self.ids[: self.start]))

    def answered(self, observation: Observation) -> list[int]:
        """Take what the environment says of the present turn, which is over; the tokens that it shows, if the episode
        goes on."""
        self.turns.append(
            Turn(start=self.start, stop=len(self.ids), reward=float(observation.reward), info=observation.info)
        )
        conversation = self.prompt.messages is not None
        if conversation:
            self.messages.append({"role": "assistant", "content": self.action})
        if observation.done:
            self.finish = FinishReason.DONE
            return []
        out_of_time = self.limits.seconds is not None and time.monotonic() - self.began > self.limits.seconds
        turns = as_turns(observation.text, where=self.limits.name) if conversation else []
        ids = self._shown(observation.text, turns)
        if out_of_time or len(self.turns) == self.limits.max_turns or len(self.ids) + len(ids) >= self.longest:
            self.finish = FinishReason.LENGTH
            return []
        self.messages += turns
        self.ids += ids
        self.mask += [False] * len(ids)
        self.start = len(self.ids)
        return ids

    def _shown(self, text: str | Sequence[Message], turns: Sequence[Message]) -> list[int]:
        """Token ids of an observation."""
        if not turns:
            if not isinstance(text, str):
                raise EpisodeError("messages were shown in a text that is no conversation", where=self.limits.name)
            return list(self.encode(text)) if text else []
        try:
            written = write_observation(self.tokenizer, turns, template_of(self.prompt.columns))
        except RowError as error:
            raise EpisodeError(str(error), where=self.limits.name) from error
        ids, ends = list(self.encode(written)), self.ending.eos
        # the template ends the model's turn, which has ended by itself unless it was cut
        return ids[1:] if self.ids[-1] in ends and ids[0] in ends else ids


def extended(
    prompt: Prompt, text: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, where: str
) -> Prompt:
    """``prompt``, followed by what a reset shows."""
    if not text:
        return prompt
    if prompt.messages is None:
        if not isinstance(text, str):
            raise EpisodeError("messages were shown after a prompt that is no conversation", where=where)
        ids = (*prompt.ids, *following_ids(tokenizer, text))
        return replace(prompt, ids=ids, text=prompt.text + text)
    messages = (*prompt.messages, *as_turns(text, where=where))
    try:
        written = write_prompt(tokenizer, messages, template_of(prompt.columns))
    except RowError as error:
        raise EpisodeError(str(error), where=where) from error
    return replace(prompt, ids=tuple(Encoder(tokenizer)(written)), text=written.text, messages=messages)


def as_turns(text: str | Sequence[Message], *, where: str) -> list[Message]:
    """What an environment shows in a conversation: text is the user's turn."""
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
    try:
        if not is_conversation(turns):
            raise EpisodeError(f"it showed {shown(turns)}, which is neither text nor messages", where=where)
        return read_turns(turns, "its observation")
    except RowError as error:
        raise EpisodeError(str(error), where=where) from error


def failed(name: str, what: str, error: BaseException) -> EpisodeError:
    return EpisodeError(f"it {what}: {type(error).__name__}: {shown(error, str)}", where=name)


# --------------------------------------------------------------------------------------------------------------- calls


@dataclass
class Calls:
    """Calls of environments in threads, so that an engine does not wait for one while there is something else to do.

    The threads are daemons: an environment that hangs does not keep the process from ending.
    """

    episodes: Episodes
    begun: dict[int, float] = field(default_factory=dict)
    """When each call that is running began, by its number."""
    numbers: Iterator[int] = field(default_factory=itertools.count)

    threads: int = 0
    jobs: SimpleQueue[tuple[Future[Observation], Callable[..., Any], Sequence[Any]] | None] = field(
        default_factory=SimpleQueue
    )
    """What is to be called; None ends a thread."""

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Empty):  # what has not begun is not called any more
            while True:
                self.jobs.get_nowait()
        for _thread in range(self.threads):
            self.jobs.put(None)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Future[Observation]:
        """Call a method of an environment; the result is checked."""
        answer: Future[Observation] = Future()
        self.jobs.put((answer, function, arguments))
        if self.threads < AT_ONCE:
            self.threads += 1
            threading.Thread(target=self._work, name="tether-environment", daemon=True).start()
        return answer

    def wait(self, answers: Sequence[Future[Observation]], *, patience: float | None = None) -> None:
        """Wait for all ``answers``, or ``patience`` seconds. Raises the error of one that failed, and
        :class:`EpisodeError` where one took longer than it may."""
        until = None if patience is None else time.monotonic() + patience
        left = set(answers)
        while left:
            check()
            rest = GLANCE if until is None else max(0.0, min(GLANCE, until - time.monotonic()))
            done, left = wait(left, timeout=rest)
            for answer in done:
                answer.result()
            self.require_in_time()
            if until is not None and time.monotonic() >= until:
                return

    def any_of(self, answers: Sequence[Future[Observation]]) -> None:
        """Wait for one of ``answers``."""
        while not any(answer.done() for answer in answers):
            self.wait(answers, patience=PATIENCE)

    def require_in_time(self) -> None:
        """Raise :class:`EpisodeError` where an environment has taken longer than it may."""
        now = time.monotonic()
        if any(now - began > self.episodes.deadline for began in list(self.begun.values())):
            raise EpisodeError(
                f"it did not answer within {self.episodes.deadline:g} s",
                where=self.episodes.name,
                hint="raise the deadline (--env-deadline), or make it faster",
            )

    def _work(self) -> None:
        """One thread."""
        while (job := self.jobs.get()) is not None:
            answer, function, arguments = job
            try:
                answer.set_result(self._answer(next(self.numbers), function, arguments))
            except BaseException as error:  # for whoever waits for the answer
                answer.set_exception(error)

    def _answer(self, number: int, function: Callable[..., Any], arguments: Sequence[Any]) -> Observation:
        self.begun[number] = time.monotonic()
        try:
            found = function(*arguments)
            if inspect.isawaitable(found):
                found = awaited(found)
        except EpisodeError:
            raise
        except BaseException as error:
            raise failed(self.episodes.name, "raised an error", error) from error
        finally:
            del self.begun[number]
        return self._checked(found)

    def _checked(self, found: Any) -> Observation:
        if not isinstance(found, Observation):
            raise EpisodeError(f"it returned {shown(found)}, which is no Observation", where=self.episodes.name)
        info = found.info
        if not isinstance(info, Mapping):
            raise EpisodeError(f"its info is {shown(info)}, which is no mapping", where=self.episodes.name)
        for what, value in [("reward", found.reward), *((f"info {name!r}", value) for name, value in info.items())]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise EpisodeError(f"its {what} is {shown(value)}, which is no finite number", where=self.episodes.name)
        return found
