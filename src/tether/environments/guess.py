"""Guess a number: many turns, and an optimum that is known.

The number is drawn uniformly from 1 to N by the seed of the episode, N from the prompt. Each guess but the right one
costs 1. Binary search needs :func:`fewest_guesses` of N, and no policy needs fewer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from tether.errors import EpisodeError
from tether.generation.environment import Observation
from tether.types import Prompt
from tether.untrusted import shown

LARGEST = 10**9


def asked(largest: int) -> str:
    """The prompt."""
    return f"Guess a number from 1 to {largest}.\n"


def fewest_guesses(largest: int) -> float:
    """The expected number of guesses of binary search, the last and right one included.

    A search is a binary tree of the N numbers; the mean depth of its nodes is least where every level but the last is
    full: sum_k min(2^k, what is left) (k + 1) / N (Knuth 1998, section 6.2.1).

    >>> fewest_guesses(1), fewest_guesses(3), round(fewest_guesses(8), 3)
    (1.0, 1.6666666666666667, 2.625)
    """
    left, level, total = largest, 0, 0
    while left:
        here = min(2**level, left)
        total += here * (level + 1)
        left, level = left - here, level + 1
    return total / largest


class GuessEnvironment:
    """Says whether the number is higher or lower. ``info`` has ``found``, 1 where it was, and ``guesses``."""

    def reset(self, prompt: Prompt, *, seed: int) -> Observation:
        match = re.search(r"from 1 to ([0-9]{1,9})\b", prompt.text)
        if match is None or int(match[1]) < 1:
            raise EpisodeError(
                f"the prompt {shown(prompt.text)} does not say 'from 1 to N'",
                where="guess",
                hint="--prompts guess makes some",
            )
        self.number = random.Random(seed).randint(1, int(match[1]))
        self.guesses = 0
        return Observation()

    def step(self, action: str) -> Observation:
        self.guesses += 1
        said = action.strip()
        guess = int(said) if re.fullmatch("[0-9]{1,9}", said) else None
        found = guess == self.number
        answer = "?" if guess is None else "higher" if guess < self.number else "lower"
        return Observation(
            text=f" {answer}\n",
            reward=0.0 if found else -1.0,
            done=found,
            info={"found": float(found), "guesses": float(self.guesses)},
        )


def rows(*, count: int, seed: int, largest: int, guesses: int) -> Sequence[dict[str, Any]]:
    """``count`` times the prompt, each with a game of random guesses as its completion."""
    rng = random.Random(f"guess {seed}")
    return [{"prompt": asked(largest), "completion": random_game(largest, guesses, rng)} for _ in range(count)]


def random_game(largest: int, guesses: int, rng: random.Random) -> str:
    """A game of random guesses, as an episode is written."""
    number, written = rng.randint(1, largest), ""
    for _ in range(guesses):
        guess = rng.randint(1, largest)
        written += str(guess)
        if guess == number:
            break
        written += f" {'higher' if guess < number else 'lower'}\n"
    return written
