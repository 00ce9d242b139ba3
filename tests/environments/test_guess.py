"""Guess-the-number, and the least number of guesses."""

from __future__ import annotations

import math
from functools import cache

import pytest

from tether.environments.guess import GuessEnvironment, asked, fewest_guesses, rows
from tether.errors import EpisodeError
from tether.types import Prompt


@cache
def least_total(numbers: int) -> int:
    """Guesses over all of the numbers, of the best first guess: by dynamic programming."""
    if not numbers:
        return 0
    return numbers + min(least_total(below) + least_total(numbers - 1 - below) for below in range(numbers))


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 15, 16, 100])
def test_the_fewest_guesses_are_those_of_the_best_tree(largest):
    assert fewest_guesses(largest) == pytest.approx(least_total(largest) / largest)


def test_binary_search_needs_as_many():
    counts = []
    for seed in range(400):
        env = GuessEnvironment()
        env.reset(Prompt(ids=(), text=asked(15)), seed=seed)
        low, high = 1, 15
        while not (seen := env.step(str((low + high) // 2))).done:
            low, high = ((low + high) // 2 + 1, high) if "higher" in seen.text else (low, (low + high) // 2 - 1)
        counts.append(seen.info["guesses"])
    assert sum(counts) / 400 == pytest.approx(fewest_guesses(15), abs=4 / math.sqrt(400))
    assert max(counts) == 4


def test_an_episode():
    env = GuessEnvironment()
    env.reset(Prompt(ids=(), text=asked(8)), seed=0)
    number = env.number
    wrong = [env.step("x"), env.step(str(number + 1)), env.step(f" {number - 1}\n")]
    assert [one.text for one in wrong] == [" ?\n", " lower\n", " higher\n"]
    assert {one.reward for one in wrong} == {-1.0}
    last = env.step(str(number))
    assert (last.done, last.reward, dict(last.info)) == (True, 0.0, {"found": 1.0, "guesses": 4.0})


def test_the_number_is_that_of_the_seed():
    def number(seed):
        env = GuessEnvironment()
        env.reset(Prompt(ids=(), text=asked(8)), seed=seed)
        return env.number

    assert [number(seed) for seed in range(20)] == [number(seed) for seed in range(20)]
    assert {number(seed) for seed in range(200)} == set(range(1, 9))


def test_a_prompt_that_asks_for_nothing_is_refused():
    with pytest.raises(EpisodeError, match="does not say 'from 1 to N'"):
        GuessEnvironment().reset(Prompt(ids=(), text="Hello"), seed=0)


def test_games_are_written_as_their_episodes():
    for row in rows(count=50, seed=1, largest=8, guesses=3):
        assert row["prompt"] == asked(8)
        turns = row["completion"].split("\n")
        assert len([turn for turn in turns if turn]) <= 3
        hints = [turn.split() for turn in turns if turn]
        assert all(0 < int(hint[0]) <= 8 for hint in hints)
