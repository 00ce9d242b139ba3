"""Sums to work out, with their answers: for rewards that check an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

SIGNS = ("+", "-")


def rows(*, count: int, seed: int, largest: int, right: int) -> Sequence[dict[str, Any]]:
    """``count`` different problems ``What is a + b?`` with numbers up to ``largest``, their ``answer``, and a
    completion that states one: the right one in ``right`` percent of the rows, else that of another problem."""
    rng = random.Random(f"arithmetic {seed}")
    if count > len(SIGNS) * (largest + 1) ** 2:
        raise ValueError(f"there are not {count} different problems with numbers up to {largest}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        a, b, sign = rng.randint(0, largest), rng.randint(0, largest), rng.choice(SIGNS)
        prompt = f"What is {a} {sign} {b}?\n"
        answer = _result(a, b, sign)
        said = answer if rng.randrange(100) < right else _result(rng.randint(0, largest), b, rng.choice(SIGNS))
        found.setdefault(prompt, {"prompt": prompt, "answer": str(answer), "completion": f"#### {said}"})
    return list(found.values())


def _result(a: int, b: int, sign: str) -> int:
    return a + b if sign == "+" else a - b
