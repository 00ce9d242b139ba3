"""What a reward server is asked, and its texts as a reward model reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.data.conversations import is_conversation, read_turns
from tether.data.reading import RowError
from tether.errors import TetherError
from tether.rewards.learned import LearnedReward
from tether.types import Completion, FinishReason, Message, Prompt, PromptCompletion
from tether.untrusted import shown


class QuestionError(Exception):
    """A request that cannot be answered, in one line."""


@dataclass(frozen=True)
class Text:
    """A text to score: a conversation where there is one, else plain text."""

    prompt: str
    completion: str
    turns: tuple[Message, ...] | None = None


def texts_of(body: bytes) -> list[Text]:
    """The texts of a request. Raises :class:`QuestionError`."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise QuestionError("the body is no JSON") from None
    if not isinstance(asked, dict):
        raise QuestionError(f"the body must be an object, found {shown(asked)}")
    queries = asked.get("query")
    if not isinstance(queries, list) or not queries or not all(isinstance(one, str) for one in queries):
        raise QuestionError("query must be a list of one text or more")
    prompts = beside(asked, "prompts", queries)
    messages = beside(asked, "messages", queries)
    return [text_of(*one, i) for i, one in enumerate(zip(queries, prompts, messages, strict=True))]


def beside(asked: dict[str, Any], name: str, queries: Sequence[str]) -> list[Any]:
    """A list of one value per query, all None where it is left out."""
    found = asked.get(name)
    if found is None:
        return [None] * len(queries)
    if not isinstance(found, list) or len(found) != len(queries):
        raise QuestionError(f"{name} must be a list of {len(queries)}, one for each query")
    return found


def text_of(query: str, prompt: Any, turns: Any, number: int) -> Text:
    """One text. A query that does not begin with its prompt is read as a whole."""
    if turns is not None:
        if not is_conversation(turns) or len(turns) < 2:
            raise QuestionError(f"messages of query {number} must be null or a list of two turns or more")
        try:
            return Text("", "", tuple(read_turns(turns, "messages")))
        except RowError as error:
            raise QuestionError(f"query {number}: {error}") from None
    if prompt is not None and not isinstance(prompt, str):
        raise QuestionError(f"the prompt of query {number} must be text, found {shown(prompt)}")
    begin = prompt if prompt and query.startswith(prompt) else ""
    return Text(begin, query[len(begin) :])


def row_of(reward: LearnedReward, text: Text, number: int) -> PromptCompletion:
    """The ids that the reward model reads. OpenRLHF's texts end with EOS or padding as text, which the reward model's
    own EOS replaces. Raises :class:`QuestionError`."""
    completion = text.completion
    ends = [end for end in (reward.tokenizer.eos_token, reward.tokenizer.pad_token) if end]
    while end := next((one for one in ends if completion.endswith(one)), ""):
        completion = completion.removesuffix(end)
    before, after = (text.turns[:-1], text.turns[-1:]) if text.turns else (None, None)
    try:
        row = reward.row(
            Prompt(ids=(0,), text=text.prompt, messages=before),
            Completion(
                ids=(0,),
                mask=(True,),
                sampler_logp=(0.0,),
                finish_reason=FinishReason.LENGTH,
                text=completion,
                weights_version=0,
                messages=after,
            ),
        )
        reward.require_room([row])
    except TetherError as error:
        raise QuestionError(f"query {number}: {error}") from error
    return row
