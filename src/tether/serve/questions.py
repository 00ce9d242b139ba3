"""What a reward server is asked, and its texts as a reward model reads them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.conversations import is_conversation, read_turns
from tether.data.reading import RowError
from tether.errors import TetherError
from tether.models.loading import eos_ids
from tether.rewards.learned import LearnedReward
from tether.rewards.signature import Signature, signature_of
from tether.types import Completion, FinishReason, Message, Prompt, PromptCompletion
from tether.untrusted import shown

Ids = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a prompt and of its completion."""
NO_IDS: Ids = (0,), (0,)


class QuestionError(Exception):
    """A request that cannot be answered, in one line."""


@dataclass(frozen=True)
class Text:
    """A text to score: a conversation where there is one, else plain text."""

    prompt: str
    completion: str
    turns: tuple[Message, ...] | None = None
    ids: Ids | None = None
    """Those that whoever asks has for prompt and completion."""


@dataclass(frozen=True)
class Question:
    """A request."""

    texts: Sequence[Text]
    signature: Signature | None = None
    """Of the tokenizer that the ids are from."""


def question_of(body: bytes) -> Question:
    """What a request asks. Raises :class:`QuestionError`."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise QuestionError("the body is no JSON") from None
    if not isinstance(asked, dict):
        raise QuestionError(f"the body must be an object, found {shown(asked)}")
    queries = asked.get("query")
    if not isinstance(queries, list) or not queries or not all(isinstance(one, str) for one in queries):
        raise QuestionError("query must be a list of one text or more")
    prompts, messages, ids = (beside(asked, name, queries) for name in ("prompts", "messages", "ids"))
    texts = [
        text_of(query, prompts[i], turns_of(messages[i], i), ids_of(ids[i], i), i) for i, query in enumerate(queries)
    ]
    return Question(texts, signature_in(asked.get("tokenizer")))


def signature_in(given: Any) -> Signature | None:
    """The signature in a request."""
    if given is None:
        return None
    kinds = {"size": int, "text": str, "conversations": str}
    if not isinstance(given, dict) or not all(type(given.get(name)) is kind for name, kind in kinds.items()):
        raise QuestionError("tokenizer must have the number size and the texts text and conversations")
    return Signature(**{name: given[name] for name in kinds})


def beside(asked: dict[str, Any], name: str, queries: Sequence[str]) -> list[Any]:
    """A list of one value per query, all None where it is left out."""
    found = asked.get(name)
    if found is None:
        return [None] * len(queries)
    if not isinstance(found, list) or len(found) != len(queries):
        raise QuestionError(f"{name} must be a list of {len(queries)}, one for each query")
    return found


def text_of(query: str, prompt: Any, turns: tuple[Message, ...] | None, ids: Ids | None, number: int) -> Text:
    """One text. A query that does not begin with its prompt is read as a whole."""
    if prompt is not None and not isinstance(prompt, str):
        raise QuestionError(f"the prompt of query {number} must be text, found {shown(prompt)}")
    begin = prompt if prompt and query.startswith(prompt) else ""
    return Text(begin, query[len(begin) :], turns, ids)


def turns_of(given: Any, number: int) -> tuple[Message, ...] | None:
    if given is None:
        return None
    if not is_conversation(given) or len(given) < 2:
        raise QuestionError(f"messages of query {number} must be null or a list of two turns or more")
    try:
        return tuple(read_turns(given, "messages"))
    except RowError as error:
        raise QuestionError(f"query {number}: {error}") from None


def ids_of(given: Any, number: int) -> Ids | None:
    if given is None:
        return None
    two = isinstance(given, list) and len(given) == 2 and all(isinstance(part, list) and part for part in given)
    if not two or not all(type(one) is int and 0 <= one < 2**31 for part in given for one in part):
        raise QuestionError(f"ids of query {number} must be null or two lists of numbers, of prompt and completion")
    return tuple(given[0]), tuple(given[1])


def reader_for(reward: LearnedReward, signature: Signature | None) -> LearnedReward:
    """``reward`` as it reads ids of a tokenizer with this ``signature``."""
    if signature is None:
        return replace(reward, same_vocabulary=False)
    own = own_signature(reward.tokenizer, signature.size)
    same_text, same_conversations = own.text == signature.text, own.conversations == signature.conversations
    return replace(
        reward,
        same_vocabulary=same_text or same_conversations,
        same_text=same_text,
        same_conversations=same_conversations,
    )


@functools.lru_cache(maxsize=8)
def own_signature(tokenizer: PreTrainedTokenizerBase, size: int) -> Signature:
    """What the tokenizer has of a signature of this size."""
    return signature_of(tokenizer, size)


def row_of(reader: LearnedReward, text: Text, number: int) -> PromptCompletion:
    """The ids that the reward model reads: those given, where they are its own (:func:`reader_for`), else those of the
    text. OpenRLHF's texts end with EOS or padding as text, which the reward model's own EOS replaces. Raises
    :class:`QuestionError`."""
    completion = text.completion
    ends = [end for end in (reader.tokenizer.eos_token, reader.tokenizer.pad_token) if end]
    while end := next((one for one in ends if completion.endswith(one)), ""):
        completion = completion.removesuffix(end)
    before, after = (text.turns[:-1], text.turns[-1:]) if text.turns else (None, None)
    if text.ids is None:
        reader = replace(reader, same_vocabulary=False)
    prompt_ids, ids = text.ids or NO_IDS
    ended = ids[-1] in eos_ids(reader.model, reader.tokenizer)
    try:
        row = reader.row(
            Prompt(ids=prompt_ids, text=text.prompt, messages=before),
            Completion(
                ids=ids,
                mask=(True,) * len(ids),
                sampler_logp=(0.0,) * len(ids),
                finish_reason=FinishReason.EOS if ended and text.ids else FinishReason.LENGTH,
                text=completion,
                weights_version=0,
                messages=after,
            ),
        )
        reader.require_room([row])
    except TetherError as error:
        raise QuestionError(f"query {number}: {error}") from error
    return row
