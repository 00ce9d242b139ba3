"""Which pairs are held out where no file of them is given: all pairs of some prompts, so that no prompt is on both
sides."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from tether.data.batching import epoch_order
from tether.data.conversations import is_conversation
from tether.types import PreferencePair


def prompt_key(pair: PreferencePair, values: Mapping[str, Any], *, front: int) -> Hashable:
    """Equal for pairs of one prompt: the row's ``prompt``; the turns that both conversations begin with; else the
    tokens that both texts begin with, of which ``front`` are the tokenizer's own. None if they begin with nothing."""
    prompt, chosen, rejected = (values.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is None and chosen and rejected and is_conversation(chosen) and is_conversation(rejected):
        turns = zip(chosen[:-1], rejected[:-1], strict=False)
        prompt = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], turns)] or None
    if prompt is not None:
        return json.dumps(prompt, sort_keys=True, default=repr)
    return pair.prompt_ids if len(pair.prompt_ids) > front else None


def hold_out(keys: Sequence[Hashable], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indexes of (training, held-out) items; items of one key are on one side, an item of key None is one by itself.

    About ``share`` of all items are held out, at least one: keys are taken in random order, and those with more items
    than are still wanted are passed over. If none is small enough, the smallest is held out. With a single key nothing
    is held out.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(("alone", index) if key is None else ("key", key), []).append(index)
    order = [list(groups.values())[i] for i in epoch_order(len(groups), seed=seed, epoch=0)]
    if len(order) < 2:
        return list(range(len(keys))), []
    wanted = max(1, round(share * len(keys)))
    held: list[list[int]] = []
    kept: list[list[int]] = []
    for group in order:
        if len(group) <= wanted:
            held.append(group)
            wanted -= len(group)
        else:
            kept.append(group)
    if not held:
        smallest = min(kept, key=len)
        kept.remove(smallest)
        held.append(smallest)
    if not kept:
        kept.append(held.pop())
    return [i for group in kept for i in group], [i for group in held for i in group]
