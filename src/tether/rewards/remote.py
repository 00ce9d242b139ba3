"""A reward that a server gives, in the form of OpenRLHF's remote reward models.

    POST {"query": [prompt + completion], "prompts": [prompt], "labels": [label or null]}
      -> {"rewards": [number], "extra_logs": {name: [number]}}

Source: ``remote_rm_utils.py`` and ``serve_rm.py`` of OpenRLHF. ``scores``, by which OpenRLHF filters prompts, are not
read. Beside them goes what OpenRLHF's servers do not read and ``tether serve-reward`` does: ``messages`` where a prompt
is a conversation, its turns and those of the completion; ``ids``, those of prompt and completion; and ``tokenizer``,
the :class:`tether.rewards.signature.Signature` by which a server knows whether they are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tether.data.conversations import joined
from tether.rewards.client import PATIENCE, Requests, Server, Session, all_of, is_finite
from tether.rewards.combine import Judgement, flattened, regrouped
from tether.rewards.function import as_given
from tether.rewards.signature import Signature
from tether.rewards.waiting import Waiting, together
from tether.types import Completion, Prompt, RolloutGroup
from tether.untrusted import shown

TOKEN = "TETHER_REWARD_TOKEN"  # noqa: S105 - the name of a variable
"""The environment variable with the token of all addresses."""
LABEL = "label"
"""The column that is sent as ``labels``."""
PER_REQUEST = 32
"""Completions of one request."""


@dataclass(frozen=True, kw_only=True)
class RemoteReward:
    """A :class:`tether.rewards.combine.Reward` that asks the server at ``url``.

    The completions of a step go out in requests of :data:`PER_REQUEST`, in their order, some at the same time. It fails
    where the server does not answer by the ``deadline`` (seconds, for all requests of a step), answers anything but one
    finite number per completion, or fails for longer than ``requests`` allow.
    """

    name: str
    url: str
    token: str | None = field(default=None, repr=False)
    deadline: float | None = None
    requests: Requests = field(default_factory=Requests)
    signature: Signature | None = None
    """The policy's; without one no ids are sent."""

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        return together([self.waiting(groups)])[0]

    def waiting(self, groups: Sequence[RolloutGroup]) -> Waiting[list[list[Judgement]]]:
        flat = flattened(groups)

        async def start() -> list[list[Judgement]]:
            return regrouped(await self._ask(flat), groups)

        return Waiting(name=self.name, start=start, deadline=self.deadline)

    async def _ask(self, flat: Sequence[tuple[Prompt, Completion]]) -> list[Judgement]:
        server = Server(
            name=self.name,
            url=self.url,
            token=self.token,
            patience=self.deadline or PATIENCE,
            requests=self.requests,
        )
        parts = [flat[i : i + PER_REQUEST] for i in range(0, len(flat), PER_REQUEST)]
        async with Session(server) as session:
            found = await all_of([self._part(session, part) for part in parts])
        return [judgement for part in found for judgement in part]

    async def _part(self, session: Session, part: Sequence[tuple[Prompt, Completion]]) -> list[Judgement]:
        return judgements(await session.post(question(part, self.signature)), len(part), session)


def question(part: Sequence[tuple[Prompt, Completion]], signature: Signature | None = None) -> dict[str, Any]:
    """What a server is sent for some completions."""
    asked: dict[str, Any] = {
        "query": [prompt.text + completion.text for prompt, completion in part],
        "prompts": [prompt.text for prompt, _ in part],
        "labels": [prompt.columns.get(LABEL) for prompt, _ in part],
    }
    if any(prompt.messages for prompt, _ in part):
        asked["messages"] = [conversation(prompt, completion) for prompt, completion in part]
    if signature is not None:
        asked["ids"] = [[prompt.ids, completion.ids] for prompt, completion in part]
        asked["tokenizer"] = vars(signature)
    return asked


def conversation(prompt: Prompt, completion: Completion) -> list[Any] | None:
    """The turns of prompt and completion; None for plain text."""
    given = as_given(prompt, completion)
    return None if prompt.messages is None or isinstance(given, str) else joined(prompt.messages, given)


def judgements(answer: Any, count: int, session: Session) -> list[Judgement]:
    """What a server said of ``count`` completions. Raises :class:`RewardError` where it did not."""
    url = session.server.url
    if not isinstance(answer, Mapping) or "rewards" not in answer:
        raise session.failure(f'{url} answered {shown(answer)}, which is no {{"rewards": [...]}}')
    rewards = numbers(answer["rewards"], count, "rewards", session)
    logs = answer.get("extra_logs") or {}
    if not isinstance(logs, Mapping):
        raise session.failure(f"{url} answered the extra_logs {shown(logs)}, which is no object")
    parts = {
        str(name): numbers(values if isinstance(values, list) else [values] * count, count, str(name), session)
        for name, values in logs.items()
    }
    return [
        Judgement(reward, parts={name: values[i] for name, values in parts.items()}) for i, reward in enumerate(rewards)
    ]


def numbers(values: Any, count: int, what: str, session: Session) -> list[float]:
    """``count`` finite numbers. Null is none: it is what NaN becomes in the JSON of many languages."""
    url = session.server.url
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else shown(values)
        raise session.failure(f"{url} answered {found} as {what} for {count} completions")
    for i, value in enumerate(values):
        if not is_finite(value):
            raise session.failure(
                f"{url} answered {shown(value)} as {what} for completion {i} of a request, no finite number"
            )
    return [float(value) for value in values]
