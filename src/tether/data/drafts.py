"""From the texts of a row to a record: what its parts come to in tokens, once they are encoded."""

from __future__ import annotations

from collections.abc import Sequence

from tether.data.encoding import Encoder, Written
from tether.data.loading import Draft
from tether.data.reading import RowError
from tether.data.shortening import Shorten, shorter_front, shorter_prompt
from tether.data.tokenise import Continuation, continuation_ids, whole_ids
from tether.types import Demonstration, PreferencePair


def some(what: str, ids: Sequence[int]) -> tuple[int, ...]:
    if not ids:
        raise RowError("no token", f"the {what} comes to no token, so nothing can follow it")
    return tuple(ids)


def learn_all(whole: Written, encoder: Encoder) -> Demonstration:
    """All tokens of a text; the first is the prompt."""
    ids = whole_ids(encoder, whole)
    some("text", ids[1:])
    return Demonstration(prompt_ids=tuple(ids[:1]), completion_ids=tuple(ids[1:]))


def learn_completion(written: Continuation, encoder: Encoder) -> Demonstration:
    prompt_ids, completion_ids = continuation_ids(encoder, written)
    return Demonstration(prompt_ids=some("prompt", prompt_ids), completion_ids=tuple(completion_ids))


def with_prompt(
    given: Sequence[Continuation], shorten: Shorten, margin: float, notes: tuple[str, ...]
) -> Draft[PreferencePair]:
    """The draft of a pair whose sides continue a prompt."""
    sides = [shorter_prompt(side, shorten) for side in given]
    return Draft(
        tuple(text for side in sides for text in side),
        lambda encoder: explicit_pair(encoder, sides, margin),
        notes,
        never_cut=tuple(side.tail for side in sides),
        shortened=sides != given,
    )


def without_prompt(
    given: tuple[Written, Written], shorten: Shorten, margin: float, notes: tuple[str, ...]
) -> Draft[PreferencePair]:
    """The draft of a pair whose prompt is what both sides begin with."""
    wholes, rests = shorter_front(given, shorten)
    return Draft(
        wholes,
        lambda encoder: implicit_pair(encoder, wholes, margin),
        notes,
        never_cut=rests,
        shortened=wholes != given,
    )


def explicit_pair(encoder: Encoder, sides: Sequence[Continuation], margin: float) -> PreferencePair:
    (prompt_ids, chosen_ids), (_, rejected_ids) = (continuation_ids(encoder, side) for side in sides)
    return pair(prompt_ids, chosen_ids, rejected_ids, margin)


def implicit_pair(encoder: Encoder, wholes: Sequence[Written], margin: float) -> PreferencePair:
    chosen, rejected = (whole_ids(encoder, whole) for whole in wholes)
    return pair(*split_common_prefix(chosen, rejected), margin)


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], margin: float) -> PreferencePair:
    if chosen == rejected:
        raise RowError("equal sides", "chosen and rejected have the same token ids, so no model can distinguish them")
    return PreferencePair(
        prompt_ids=tuple(prompt), chosen_ids=tuple(chosen), rejected_ids=tuple(rejected), margin=margin
    )


def split_common_prefix(a: list[int], b: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The common prefix, at least one token shorter than either side, and the rest of each."""
    limit = min(len(a), len(b)) - 1
    same = next((i for i in range(limit) if a[i] != b[i]), limit)
    return a[:same], a[same:], b[same:]
