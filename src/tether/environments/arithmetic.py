"""Sums to work out, with their answers: for rewards that check an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def rows(*, count: int, seed: int, largest: int, right: int) -> Sequence[dict[str, Any]]:
    """``count`` different problems ``What is a + b?`` with numbers up to ``largest``, their ``answer``, and a
    completion that works it out. In all but ``right`` percent of them one column is added up wrong."""
    rng = random.Random(f"arithmetic {seed}")
    if count > (largest + 1) ** 2:
        raise ValueError(f"there are not {count} different problems with numbers up to {largest}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        prompt = f"What is {a} + {b}?\n"
        said = solution(a, b, rng, wrong=rng.randrange(100) >= right)
        found.setdefault(prompt, {"prompt": prompt, "answer": str(a + b), "completion": said})
    return list(found.values())


def solution(a: int, b: int, rng: random.Random, *, wrong: bool = False) -> str:
    """Column by column from the right, each with what is carried; one of them off by one where it is ``wrong``.

    >>> solution(17, 25, random.Random(0))
    '7+5=12 1+2+1=4 #### 42'
    """
    width = max(len(str(a)), len(str(b)))
    slip = rng.randrange(width) if wrong else None
    steps, answer, carry = [], 0, 0
    for place in range(width):
        digits = [a // 10**place % 10, b // 10**place % 10] + [1] * carry
        total = sum(digits) + (place == slip)
        steps.append(f"{'+'.join(map(str, digits))}={total}")
        answer += (total if place == width - 1 else total % 10) * 10**place
        carry = total // 10
    return f"{' '.join(steps)} #### {answer}"
