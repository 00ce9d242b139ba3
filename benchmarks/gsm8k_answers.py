"""Grade GSM8K's gold answers in many notations, wrong ones, malformed ones, and expressions that hang.

    python -m benchmarks.gsm8k_answers --data test.jsonl

Each gold answer has to be right in every notation by ``exact_answer`` and by ``math``, each perturbed or malformed one
wrong, and an expression that hangs has to cost its deadline and no more; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from tether.rewards.answer_rules import AgainstColumn, exact_answer, math_
from tether.rewards.answers import number

WRONG, DEADLINE, SLACK = 200, 2.0, 0.5
"""Perturbed answers; seconds for a comparison, and those that ending one may cost besides."""


def plain(text: str) -> Fraction:
    value = number(text)
    assert value is not None, text
    return value


def scientific(text: str) -> str:
    """The number as a decimal below 10 and a power of ten.

    >>> scientific("1,250")
    '1.25e3'
    """
    digits = str(abs(plain(text).numerator))
    sign = "-" if plain(text) < 0 else ""
    mantissa = f"{digits[0]}.{digits[1:]}".rstrip("0").rstrip(".")
    return f"{sign}{mantissa}e{len(digits) - 1}"


def fraction(text: str) -> str:
    value = plain(text)
    return rf"\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}"


NOTATIONS: Mapping[str, Callable[[str], str]] = {
    "as GSM8K marks it": lambda n: f"It is so.\n#### {n}",
    "in a box": lambda n: rf"So the answer is $\boxed{{{n}}}$.",
    "at the end of a sentence": lambda n: f"The answer is {n}.",
    "alone": lambda n: n,
    "with a dollar sign": lambda n: f"#### ${n}",
    "with decimals": lambda n: rf"\boxed{{{n}.00}}",
    "with thousands separators": lambda n: rf"\boxed{{{plain(n).numerator:,}}}",
    "as LaTeX separates thousands": lambda n: rf"\boxed{{{f'{plain(n).numerator:,}'.replace(',', '{,}')}}}",
    "without separators": lambda n: f"#### {plain(n).numerator}",
    "as a fraction": lambda n: rf"\boxed{{{fraction(n)}}}",
    "as a quotient": lambda n: f"#### {3 * plain(n)}/3",
    "with an exponent": lambda n: rf"\boxed{{{scientific(n)}}}",
    "after other numbers": lambda n: f"First 3, then 4, and {n}",
    "after another box": lambda n: rf"\boxed{{-1}}, no: \boxed{{{n}}}",
}
"""Ways to write a whole number that ``exact_answer`` and ``math`` know."""
SYMBOLIC: Mapping[str, Callable[[str], str]] = {
    "with a unit": lambda n: rf"\boxed{{{n}\text{{ dollars}}}}",
    "as an equation": lambda n: rf"\boxed{{x = {plain(n)}}}",
    "as a sum": lambda n: rf"\boxed{{{plain(n) - 1} + 1}}",
    "as a product": lambda n: rf"\boxed{{3 \cdot \frac{{{plain(n)}}}{{3}}}}",
}
"""Ways that only ``math`` knows."""

MALFORMED = (
    "", " ", "\\", "{", "}", "$", "$$", "$$$", r"\boxed{", r"\boxed{}", r"\boxed{ }", r"\boxed{{}", r"\boxed}{", "####",
    "#### ", "#### {", r"\frac{1}{", r"\boxed{\frac{1}{}}", r"\boxed{\frac{}{}}", r"\boxed{\sqrt}", r"\boxed{^}",
    r"\boxed{1/0}", r"\boxed{0^{0^{0}}}", r"\boxed{\left(}", r"\boxed{\unknown{-1}}", r"\boxed{\text{}}", "\x00",
    "\ud800", r"\boxed{-1;-2;;}", r"\boxed{\begin{matrix}}", "\\boxed{" * 50,
    r"\boxed{__import__('os').system('true')}", "9" * 5000, r"\boxed{" + "9" * 5000 + "}", "(" * 300, "é😀\u202e",
    "\\frac{1}" * 200, "$" + "^" * 500 + "$", "\n" * 1000 + "\\(",
)  # fmt: skip
HANGING = (
    r"9^{9^{9^{9}}}", r"10^{10^{10}}", r"(10^{9})!", r"9!!!!!!", r"2^{-10^{12}}", r"\binom{10^9}{10^8}",
    r"\cos(1)^{999999}", r"\sum_{i=1}^{10^{9}} \frac{1}{i}", r"(x+y+z)^{500}", r"\lfloor 10^{10^{8}} \rfloor",
)  # fmt: skip


def perturbed(n: str, i: int) -> str:
    """Another number than ``n``, close to it in one of several ways."""
    value = plain(n).numerator
    others = (value + 1, value - 1, -value - 1, value * 10 + 7, value + 1000, 2 * value + 3)
    return f"{others[i % len(others)]:,}"


def numbers_of(file: Path) -> list[tuple[str, str]]:
    """Each gold solution, and the number that it marks."""
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [(answer, answer.rsplit("####", 1)[1].strip()) for answer in answers]


def grade(rule: AgainstColumn, golds: Sequence[str], texts: Sequence[str]) -> list[float | None]:
    return list(rule(completions=list(texts), answer=list(golds)))


def notations(rule: AgainstColumn, rows: Sequence[tuple[str, str]], ways: Mapping[str, Callable[[str], str]]) -> bool:
    fine = True
    for name, write in ways.items():
        started = time.monotonic()
        right = grade(rule, [gold for gold, _ in rows], [write(n) for _, n in rows]).count(1.0)
        fine &= right == len(rows)
        print(f"{rule.rule:<13} {name:<29} {right} of {len(rows)} right, {time.monotonic() - started:.1f} s")
    return fine


def wrong(rule: AgainstColumn, rows: Sequence[tuple[str, str]]) -> bool:
    chosen = random.Random(0).sample(list(rows), WRONG)
    ways = list(NOTATIONS.values())[:3]
    texts = [ways[i % len(ways)](perturbed(n, i)) for i, (_, n) in enumerate(chosen)]
    found = grade(rule, [gold for gold, _ in chosen], texts).count(0.0)
    print(f"{rule.rule:<13} {found} of {WRONG} perturbed answers wrong")
    started = time.monotonic()
    refused = grade(rule, ["72"] * len(MALFORMED), MALFORMED).count(0.0)
    print(f"{rule.rule:<13} {refused} of {len(MALFORMED)} malformed ones wrong, {time.monotonic() - started:.1f} s")
    return (found, refused) == (WRONG, len(MALFORMED))


def hanging() -> bool:
    rule = math_(f"answer:{DEADLINE}")
    grade(rule, ["72"], [r"\boxed{x}"])
    fine = True
    for expression in HANGING:
        began = time.monotonic()
        values = grade(rule, ["72"], [rf"\boxed{{{expression}}}"])
        ended = time.monotonic()
        values += grade(rule, ["72"], [r"\boxed{70 + 2}"])
        hung, after = ended - began, time.monotonic() - ended
        fine &= values == [0.0, 1.0] and hung < DEADLINE + SLACK and after < SLACK
        print(
            f"math          {expression:<31} {values[0]} in {hung:.2f} s; 70 + 2 after it {values[1]} in {after:.2f} s"
        )
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's test.jsonl")
    rows = numbers_of(parser.parse_args().data)
    exact, symbolic = exact_answer(None), math_(None)
    checks = [
        notations(exact, rows, NOTATIONS),
        notations(symbolic, rows, {**NOTATIONS, **SYMBOLIC}),
        wrong(exact, rows),
        wrong(symbolic, rows),
        hanging(),
    ]
    sys.exit(not all(checks))


if __name__ == "__main__":
    main()
