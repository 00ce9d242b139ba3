"""Held-out pairs: no prompt is on both sides."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tether.data.splitting import hold_out, prompt_key
from tether.types import PreferencePair

PAIR = PreferencePair(prompt_ids=(0, 5), chosen_ids=(6, 1), rejected_ids=(7, 1))
USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "and?"}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=40), st.floats(0.01, 0.99))
@example([1] * 5, 0.5)
@example([None], 0.5)
@example([1] * 10 + [2] * 10, 0.1)
def test_every_item_is_on_one_side_and_so_is_every_key(keys, share):
    training, held = hold_out(keys, share=share, seed=3)
    assert sorted(training + held) == list(range(len(keys)))
    assert not {keys[i] for i in training} & {keys[i] for i in held} - {None}
    sizes = Counter(("alone", i) if key is None else key for i, key in enumerate(keys))
    assert bool(held) == (len(sizes) > 1)
    assert training
    if held:
        assert len(held) <= max(1, round(share * len(keys)), min(sizes.values()))
    assert hold_out(keys, share=share, seed=3) == (training, held)


def test_a_pair_per_prompt_gives_the_share_asked_for():
    assert [len(side) for side in hold_out(range(200), share=0.1, seed=0)] == [180, 20]
    assert [len(side) for side in hold_out([i // 4 for i in range(200)], share=0.1, seed=0)] == [180, 20]
    assert hold_out(range(200), share=0.1, seed=0) != hold_out(range(200), share=0.1, seed=1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}, True),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "b"}, False),
        ({"prompt": [USER]}, {"prompt": [dict(reversed(USER.items()))]}, True),
        (
            {"chosen": [USER, says("Sure, a")], "rejected": [USER, says("Sure, b")]},
            {"chosen": [USER, says("No")], "rejected": [USER, says("Yes")]},
            True,
        ),
        (
            {"chosen": [USER, says("a"), MORE, says("a")], "rejected": [USER, says("a"), MORE, says("b")]},
            {"chosen": [USER, says("b"), MORE, says("a")], "rejected": [USER, says("b"), MORE, says("b")]},
            False,
        ),
    ],
)
def test_the_prompt_of_a_row(one, other, same):
    assert (prompt_key(PAIR, one, front=1) == prompt_key(PAIR, other, front=1)) is same


def test_a_prompt_that_is_implicit_in_texts_is_their_common_tokens():
    assert prompt_key(PAIR, {"prompt": None, "chosen": "a", "rejected": "b"}, front=1) == (0, 5)
    assert prompt_key(PAIR, {"chosen": "a", "rejected": "b"}, front=2) is None
