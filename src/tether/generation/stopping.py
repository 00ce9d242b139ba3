"""When a completion is over, and what it reads like: one definition for the engine and the oracle."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tether.types import Finish, Sampling

CONTEXT = 8
"""Prompt tokens that a completion is decoded behind."""


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
    """A completion for people and rules, special tokens left out, so that prompt + completion reads as one text.

    It is decoded behind the end of its prompt, ``after``, because some tokenizers drop the space that a text begins
    with.
    """
    context = list(after[-CONTEXT:])
    head = str(tokenizer.decode(context, skip_special_tokens=True)) if context else ""
    whole = str(tokenizer.decode([*context, *ids], skip_special_tokens=True))
    return (
        whole.removeprefix(head)
        if whole.startswith(head)
        else str(tokenizer.decode(list(ids), skip_special_tokens=True))
    )


def finish_of(
    ids: Sequence[int], sampling: Sampling, eos_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> Finish | None:
    """Why a completion that just emitted ``ids[-1]`` is over, or None while it is not.

    A stop string counts once the minimum length is reached. Only the tail that could hold it is decoded: a stop string
    of n bytes ends in the last token, so it begins within the last n tokens.
    """
    if ids[-1] in eos_ids:
        return Finish.EOS
    if sampling.stop and len(ids) >= sampling.min_new_tokens:
        reach = max(len(stop.encode()) for stop in sampling.stop) + 4  # a few more, for characters of several tokens
        tail = text_of(tokenizer, ids[-reach:])
        if any(stop in tail for stop in sampling.stop):
            return Finish.STOP
    if len(ids) == sampling.max_new_tokens:
        return Finish.LENGTH
    return None
