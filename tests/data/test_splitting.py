"""Held-out pairs: no prompt is on both sides, however the rows hold it."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tether.data.splitting import PromptKey, hold_out, prompt_key, together
from tether.types import PreferencePair

PAIR = PreferencePair(prompt_ids=(0, 5), chosen_ids=(6, 1), rejected_ids=(7, 1))
USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "and?"}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def turns(*texts: str) -> PromptKey:
    return PromptKey("turns", texts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 40), st.sets(st.integers(0, 9), max_size=4))
@example([1] * 5, 2, set())
@example([1], 1, set())
@example([1] * 10 + [2] * 10, 2, set())
@example([1, 2], 1, {2})
@example([1, 2], 1, {1, 2})
def test_every_item_is_on_one_side_and_so_is_every_key(keys, count, apart):
    remaining, held = hold_out(keys, count=count, seed=3, apart=apart)
    assert sorted(remaining + held) == list(range(len(keys)))
    assert not {keys[i] for i in remaining} & {keys[i] for i in held}
    assert not {keys[i] for i in held} & apart
    sizes = Counter(key for key in keys if key not in apart)
    assert bool(held) == (bool(sizes) and len(set(keys)) > 1)
    assert remaining
    if held:
        assert len(held) <= max(1, count, min(sizes.values()))
    assert hold_out(keys, count=count, seed=3, apart=apart) == (remaining, held)


def test_a_pair_per_prompt_gives_the_count_asked_for():
    assert [len(side) for side in hold_out(range(200), count=20, seed=0)] == [180, 20]
    assert [len(side) for side in hold_out([i // 4 for i in range(200)], count=20, seed=0)] == [180, 20]
    assert hold_out(range(200), count=20, seed=0) != hold_out(range(200), count=20, seed=1)


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


LONG = "Which of these is the larger number?"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("\n\nHuman: hi\n\nAssistant: Sure, {}", "\n\nHuman: hi\n\nAssistant: {}", True),  # the answers begin alike
        ("\n\nHuman: hi\n\nAssistant: {}", "\n\nHuman: ho\n\nAssistant: {}", False),
        ("Human: hi\n\nAssistant: {}", "\n\nHuman: hi\n\nAssistant: well, {}", True),
        ("\n\nHuman: hi\n\nAssistant: {}", "\n\nHuman: hi\n\nAssistant: a\n\nHuman: no\n\nAssistant: {}", True),
        (f"{LONG} Sure, {{}}", f"{LONG} {{}}", True),
        (f"{LONG} {{}}", f"{LONG[:-1]}! {{}}", False),
        ("Why? Sure, {}", "Why? {}", False),  # too short to be more than chance
    ],
)
def test_an_implicit_prompt_of_texts(one, other, same):
    keys = [
        prompt_key(
            replace(PAIR, prompt_ids=(0, i)), {"chosen": text.format("x"), "rejected": text.format("y")}, front=1
        )
        for i, text in enumerate((one, other))
    ]
    first, second = together(keys)
    assert (first == second) is same


def test_a_short_prompt_that_is_implicit_in_texts_is_their_common_tokens():
    texts = {"prompt": None, "chosen": "a", "rejected": "b"}
    assert prompt_key(PAIR, texts, front=1) == PromptKey("tokens", (0, 5))


def test_a_row_without_a_prompt_is_one_by_itself_and_its_copies():
    texts, turned = {"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}
    key = prompt_key(PAIR, texts, front=2)
    swapped = replace(PAIR, chosen_ids=PAIR.rejected_ids, rejected_ids=PAIR.chosen_ids)
    assert prompt_key(swapped, turned, front=2) == key
    assert prompt_key(replace(PAIR, chosen_ids=(9, 1)), texts, front=2) != key


def test_conversations_of_which_one_continues_the_other_are_together():
    first, second, third = (turns("a"), turns("a", "b", "c"), turns("b", "a"))
    assert together([second, first, third, first]) == [first, first, third, first]
    assert together([turns("a", "x"), turns("a", "y")]) == [turns("a", "x"), turns("a", "y")]


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=20))
def test_each_key_becomes_the_shortest_that_it_begins_with(texts):
    """Against a search through all pairs of keys."""
    keys = [turns(*text) for text in texts]
    expected = [min((key for key in keys if one.contains(key)), key=lambda key: len(key.units)) for one in keys]
    assert together(keys) == expected
    assert together([PromptKey("prompt", text) for text in texts]) == [PromptKey("prompt", text) for text in texts]
