"""When a completion ends, and its text: one definition for the engine and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.models.loading import eos_ids
from tether.types import FinishReason, Sampling

CONTEXT = 8
"""Prompt tokens that are decoded together with a completion; more where these have no text."""
SLACK = 4
"""More tokens than a stop string has bytes are searched for it, for characters of several tokens."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of ``ids`` as it is, without the spaces before punctuation tidied away; with ``special`` tokens too."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def text_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, after: Sequence[int] = (), special: bool = False
) -> str:
    """The text of a completion, such that prompt + completion is one text; ``special`` tokens are part of it on demand.

    It is decoded together with the end of its prompt, ``after``, because some tokenizers drop the space that a text
    begins with.
    """
    context = context_of(tokenizer, after)
    head, whole = (decoded(tokenizer, part, special=special) for part in (context, [*context, *ids]))
    return whole.removeprefix(head) if whole.startswith(head) else decoded(tokenizer, ids, special=special)


def context_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The shortest end of ``ids`` of at least :data:`CONTEXT` tokens that has text, or all of them."""
    count = CONTEXT
    while count < len(ids) and not decoded(tokenizer, ids[-count:]):
        count *= 2
    return list(ids[-count:])


@dataclass(frozen=True)
class Ending:
    """What ends a completion: an end-of-sequence token, a stop string or the length limit."""

    sampling: Sampling
    eos: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Ending:
        """The ends of this model's completions."""
        return Ending(sampling, eos_ids(model, tokenizer), tokenizer)

    @cached_property
    def special(self) -> dict[int, str]:
        """Special tokens, by id: the text of a completion does not show them."""
        added = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))

    @cached_property
    def special_stops(self) -> tuple[str, ...]:
        """The stop strings that hold a special token. No other is looked for in one: "a" is not in ``<pad>``."""
        return tuple(stop for stop in self.sampling.stop if any(token in stop for token in self.special.values()))

    def reason(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> FinishReason | None:
        """Why a completion of the prompt ``after`` whose last token is ``ids[-1]`` ends there; None where it does not.

        A stop string counts from the minimum length on.
        """
        if ids[-1] in self.eos:
            return FinishReason.EOS
        if self.sampling.stop and len(ids) >= self.sampling.min_new_tokens and self._stops(ids, after):
            return FinishReason.STOP
        if len(ids) == self.sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _stops(self, ids: Sequence[int], after: Sequence[int]) -> bool:
        """Whether a stop string is in the text, or in the text with special tokens if it holds one.

        Only the tail that could hold one is decoded: a stop string of n bytes ends in the last token, so it begins
        within the last n tokens that have text. Where the tail is the whole completion, it is decoded behind something
        that has text, so that its first token keeps the space that it may stand for.
        """
        reach = max(len(stop.encode()) for stop in self.sampling.stop) + SLACK
        start, found = len(ids), 0
        while start and found < reach:
            start -= 1
            found += ids[start] not in self.special
        tail, before = ids[start:], () if start else self._visible_context(after) or ids
        if any(stop in text_of(self.tokenizer, tail, after=before) for stop in self.sampling.stop):
            return True
        if not self.special_stops or self.special.keys().isdisjoint(tail):
            return False
        shown = text_of(self.tokenizer, tail, after=before, special=True)
        return any(stop in shown for stop in self.special_stops)

    def _visible_context(self, after: Sequence[int]) -> list[int]:
        """The end of a prompt, if it has text; else nothing."""
        context = context_of(self.tokenizer, after)
        return context if decoded(self.tokenizer, context) else []
