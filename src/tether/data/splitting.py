"""Which pairs are held out where no file of them is given: all pairs of some prompts, so that splits share no prompt.

Rows are told to be of one prompt by what they hold, see :func:`prompt_key`, and rows of which one continues the
conversation of the other count as one prompt, see :func:`together`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from tether.data.batching import epoch_order
from tether.data.conversations import is_conversation
from tether.data.texts import REPEATED, common
from tether.types import PreferencePair

_TURN = re.compile(r"\n\n(?=(?:Human|User|Assistant):)")
"""Where a turn begins in a conversation that is written as one text."""


class PromptKey(NamedTuple):
    """What a row says about its prompt; rows with equal keys have one prompt."""

    kind: str
    """``turns``, ``beginning``, ``prompt``, ``tokens`` or ``pair``: where it was found."""
    units: Sequence[Hashable]
    """Turns, characters or tokens."""

    def contains(self, other: PromptKey) -> bool:
        """Whether this prompt begins with all of the ``other`` one, turn by turn or character by character."""
        return (
            self.kind in ("turns", "beginning")
            and self.kind == other.kind
            and self.units[: len(other.units)] == other.units
        )


def prompt_key(pair: PreferencePair, values: Mapping[str, Any], *, front: int) -> PromptKey:
    """The prompt of a row: its column ``prompt``; the turns that both sides begin with, in lists or written as one text
    ("Human: ... Assistant: ..."); the characters that both texts begin with, if they are :data:`REPEATED` or more; else
    the tokens, of which ``front`` are the tokenizer's own.

    A row without a prompt has its two sides as the key, so that equal rows stay together.
    """
    prompt, chosen, rejected = (values.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is not None:
        turns = _turns(prompt)
        return PromptKey("turns", turns) if turns else PromptKey("prompt", _plain(prompt))
    both = zip(_turns(chosen)[:-1], _turns(rejected)[:-1], strict=False)
    if turns := tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], both)):
        return PromptKey("turns", turns)
    if isinstance(chosen, str) and isinstance(rejected, str):
        beginning = chosen[: common(chosen, rejected)]
        if len(beginning.strip()) >= REPEATED:
            return PromptKey("beginning", beginning)
    if len(pair.prompt_ids) > front:
        return PromptKey("tokens", pair.prompt_ids)
    return PromptKey("pair", tuple(sorted([pair.chosen_ids, pair.rejected_ids])))


def _turns(value: Any) -> tuple[str, ...]:
    """The turns of a conversation, in a list or written as one text, without an empty one at its end; none in other
    text."""
    if isinstance(value, str):
        turns = tuple(turn.strip() for turn in _TURN.split(f"\n\n{value.lstrip()}") if turn.strip())
        if not turns or not _TURN.match(f"\n\n{turns[0]}"):
            return ()
        return turns[:-1] if turns[-1].endswith("Assistant:") else turns
    return tuple(map(_plain, value)) if is_conversation(value) else ()


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def together(keys: Sequence[PromptKey]) -> list[PromptKey]:
    """``keys``, each replaced by the shortest of them that it begins with.

    A conversation goes on where another row has its prompt, so one holds the answer that the other is judged by. And
    where both sides of an implicit pair begin alike ("Sure, "), the row's prompt seems to be longer than that of
    another row with the same one.
    """
    found: dict[PromptKey, PromptKey] = {}
    shortest: PromptKey | None = None
    for key in sorted(set(keys)):  # what begins with a key follows it
        if shortest is None or not key.contains(shortest):
            shortest = key
        found[key] = shortest
    return [found[key] for key in keys]


def hold_out(
    keys: Sequence[Hashable], *, count: int, seed: int, apart: Collection[Hashable] = ()
) -> tuple[list[int], list[int]]:
    """Indexes of (remaining, held-out) items; items of one key are on one side, those of a key in ``apart`` remain.

    About ``count`` items are held out, at least one: keys are taken in random order, and those with more items than are
    still wanted are passed over. If none is small enough, the smallest is held out. If no other key would remain,
    nothing is held out.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    order = [list(groups)[i] for i in epoch_order(len(groups), seed=seed, epoch=0)]
    free = [key for key in order if key not in apart]
    if not free or len(order) < 2:
        return list(range(len(keys))), []
    wanted = max(1, count)
    held: list[Hashable] = []
    for key in free:
        if len(groups[key]) <= wanted:
            held.append(key)
            wanted -= len(groups[key])
    held = held or [min(free, key=lambda key: len(groups[key]))]
    if len(held) == len(order):
        held.pop()
    out = set(held)
    kept = [key for key in order if key not in out]
    return [i for key in kept for i in groups[key]], [i for key in held for i in groups[key]]
