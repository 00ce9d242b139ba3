"""When a completion ends, and its text: one definition for the engine and the oracle."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tether.types import FinishReason, Sampling

CONTEXT = 8
"""Prompt tokens that are decoded together with a completion."""


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
    """The text of a completion without special tokens, such that prompt + completion is one text.

    It is decoded together with the end of its prompt, ``after``, because some tokenizers drop the space that a text
    begins with.
    """
    context = list(after[-CONTEXT:])
    head = str(tokenizer.decode(context, skip_special_tokens=True)) if context else ""
    whole = str(tokenizer.decode([*context, *ids], skip_special_tokens=True))
    return (
        whole.removeprefix(head)
        if whole.startswith(head)
        else str(tokenizer.decode(list(ids), skip_special_tokens=True))
    )


def finish_reason_of(
    ids: Sequence[int], sampling: Sampling, eos_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase
) -> FinishReason | None:
    """Why a completion whose last token is ``ids[-1]`` ends there, or None where it does not end.

    A stop string counts from the minimum length on. Only the tail that could hold it is decoded: a stop string of n
    bytes ends in the last token, so it begins within the last n tokens.
    """
    if ids[-1] in eos_ids:
        return FinishReason.EOS
    if sampling.stop and len(ids) >= sampling.min_new_tokens:
        reach = max(len(stop.encode()) for stop in sampling.stop) + 4  # more, for characters of several tokens
        tail = text_of(tokenizer, ids[-reach:])
        if any(stop in tail for stop in sampling.stop):
            return FinishReason.STOP
    if len(ids) == sampling.max_new_tokens:
        return FinishReason.LENGTH
    return None
