"""Word problems, and a calculator to solve them with.

The policy writes lines. A turn that ends with ``=`` asks the calculator for what stands before it on its line, and is
shown the result; any other turn is an answer, and ends the episode. What is asked is parsed, never run.

    Tom has 3 boxes with 12 pens each. He gives 9 pens away. How many pens are left?
    3*12= 36
    36-9= 27
    #### 27

The reward is 1 for the right answer, as :class:`tether.rewards.answer_rules.Exact` finds it, else 0.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from tether.errors import EpisodeError
from tether.generation.environment import Observation
from tether.rewards.answer_rules import Exact
from tether.types import Prompt

LONGEST, LARGEST = 100, 10**12
"""Characters of an expression, and the largest number that may occur in one."""
WRITTEN = re.compile(r"([0-9.]+(e[0-9]+)?(?!\w)|[-+*/() ])*")
"""Numbers and signs: Python's parser warns of some other texts."""
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def calculate(expression: str) -> str:
    """What an expression of numbers, ``+ - * /`` and parentheses comes to, exactly: ``27``, ``1/3`` or ``error``.

    >>> calculate("3*(4+5)"), calculate("1/3"), calculate("0.5*7"), calculate("1/0"), calculate("exit()")
    ('27', '1/3', '7/2', 'error', 'error')
    """
    if len(expression) > LONGEST or not WRITTEN.fullmatch(expression):
        return "error"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> Fraction:
    """Raises :class:`ValueError` for anything but arithmetic, and where a number is too large."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = -_value(inner)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATIONS:
            value = OPERATIONS[type(operator)](_value(left), _value(right))
        case _:
            raise ValueError("not arithmetic")
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("too large")
    return value


class CalculatorEnvironment:
    """A calculator beside a problem whose prompt has a column ``answer``. ``info`` has ``right``, and ``calls``, how
    often the calculator was asked."""

    def reset(self, prompt: Prompt, *, seed: int) -> Observation:  # noqa: ARG002 - the prompt says all
        answer = prompt.columns.get("answer")
        if answer is None:
            raise EpisodeError(
                "the prompts need a column 'answer'", where="calculator", hint="--prompts problems makes some"
            )
        self.answer, self.calls = Exact().gold(answer), 0
        return Observation()

    def step(self, action: str) -> Observation:
        said = action.rstrip()
        if said.endswith("="):
            self.calls += 1
            expression = said.removesuffix("=").rpartition("\n")[2]
            return Observation(text=f" {calculate(expression)}\n", info=self._info(0.0))
        right = float(Exact().right(self.answer, said))
        return Observation(reward=right, done=True, info=self._info(right))

    def _info(self, right: float) -> dict[str, float]:
        return {"right": right, "calls": float(self.calls)}


# ------------------------------------------------------------------------------------------------------------ problems

NAMES = ("Tom", "Ann", "Ben", "Lily", "Sam", "Mia")
THINGS = ("pens", "apples", "books", "coins", "cards", "shells")
KINDS: Sequence[tuple[str, str, str]] = (
    (
        "{name} has {a} boxes with {b} {things} each. {c} {things} are lost. How many {things} are left?",
        "{a}*{b}",
        "-{c}",
    ),
    (
        "{name} has {a} boxes with {b} {things} each and finds {c} more {things}. How many {things} are there now?",
        "{a}*{b}",
        "+{c}",
    ),
    (
        "On each of {c} days {name} buys {a} small {things} and {b} large {things}. How many {things} does {name} buy?",
        "{a}+{b}",
        "*{c}",
    ),
)
"""A text, the first calculation, and what is done with its result."""


def rows(*, count: int, seed: int, largest: int, right: int) -> Sequence[dict[str, Any]]:
    """``count`` different problems with their answer, and a solution as its episode is written. ``right``
    percent of the solutions are; the others calculate something else than they should."""
    rng = random.Random(f"problems {seed}")
    found: dict[str, dict[str, Any]] = {}
    tries = 0
    while len(found) < count:
        tries += 1
        if tries > 100 * count:
            raise ValueError(f"there are not {count} different problems with numbers up to {largest}")
        text, first, then = rng.choice(KINDS)
        numbers = {key: rng.randint(2, largest) for key in "abc"}
        numbers["c"] = min(numbers["c"], numbers["a"] * numbers["b"])
        prompt = text.format(name=rng.choice(NAMES), things=rng.choice(THINGS), **numbers) + "\n"
        steps = [first.format(**numbers), then.format(**numbers)]
        result = calculate(f"({steps[0]}){steps[1]}")
        found.setdefault(prompt, {"prompt": prompt, "answer": result, "completion": solution(steps, rng, right)})
    return list(found.values())


def solution(steps: Sequence[str], rng: random.Random, right: int) -> str:
    """Two calculations and the answer. One that is wrong has another sign in one of them."""
    wrong = None if rng.randrange(100) < right else rng.randrange(2)
    first, then = (other_sign(step, rng) if i == wrong else step for i, step in enumerate(steps))
    between = calculate(first)
    result = calculate(f"{between}{then}")
    return f"{first}= {between}\n{between}{then}= {result}\n#### {result}"


def other_sign(step: str, rng: random.Random) -> str:
    sign = next(character for character in step if character in "+-*")
    return step.replace(sign, rng.choice([one for one in "+-*" if one != sign]), 1)
