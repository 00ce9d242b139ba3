"""Built-in rewards that compare a completion with the right answer, which a column of the data holds."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tether.errors import RewardError
from tether.rewards.answers import canonical, final_answer, marked, number
from tether.rewards.choices import choice, letter_of
from tether.rewards.grader import DEADLINE, Grader
from tether.rewards.text_rules import Rule, text_of
from tether.types import Prompt
from tether.untrusted import shown


class Grading(Protocol):
    """How answers are compared."""

    def gold(self, cell: Any) -> Any:
        """The right answer that a cell of the column holds. Raises :class:`RewardError` where it holds none."""
        ...

    def right(self, gold: Any, text: str) -> bool:
        """Whether a completion's ``text`` gives the answer ``gold``."""
        ...


@dataclass(frozen=True)
class AgainstColumn:
    """1 where the answer of a completion is that of its row's ``column``, 0 where it is another, None where the column
    has none: None, or NaN."""

    rule: str
    column: str
    grading: Grading

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if self.column not in columns:
            raise RewardError(f"reward {self.rule!r} needs the column {self.column!r} in the prompts")
        return [
            None if _missing(cell) else float(self.grading.right(self.grading.gold(cell), text_of(completion)))
            for completion, cell in zip(completions, columns[self.column], strict=True)
        ]

    def require(self, prompts: Iterable[Prompt], source: str) -> None:
        """Raise :class:`RewardError` that names the row of the first cell without a usable answer."""
        for i, prompt in enumerate(prompts, start=1):
            cell = prompt.columns.get(self.column)
            try:
                if not _missing(cell):
                    self.grading.gold(cell)
            except RewardError as error:
                error.at(f"{source}: prompt {i} ({shown(prompt.text[-60:])})")
                raise


def _missing(cell: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that stands for it in a column of numbers."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def against_column(function: Callable[..., Any]) -> AgainstColumn | None:
    """What a built-in rule compares with a column, if it does."""
    match function:
        case AgainstColumn():
            return function
        case Cosine():
            return function.answer
    return None


class Exact:
    """The final answer is what the last ``\\boxed{...}`` holds, else what the last ``####`` marks, else, in a
    completion, the last number, else the whole text. Numbers and fractions are compared exactly, however they are
    written, and anything else as text without case and outer white space (:mod:`tether.rewards.answers`).
    """

    def gold(self, cell: Any) -> Any:
        return canonical(marked(str(cell)) or str(cell))

    def right(self, gold: Any, text: str) -> bool:
        return bool(final_answer(text) == gold)


def exact_answer(argument: str | None) -> AgainstColumn:
    """``exact_answer`` or ``exact_answer:COLUMN``: :class:`Exact` answers, by default of the column ``answer``."""
    return AgainstColumn("exact_answer", argument or "answer", Exact())


# -- math -----------------------------------------------------------------------------------------------------------

LONGEST = 2000
"""Characters of an answer that math-verify reads, and those at the end of a completion that marks none."""
_DECIMAL = re.compile(r"-?[0-9]*\.?[0-9]+")
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_FORMULA = re.compile(r"(?<!\\)\$|\\\(|\\\[")


@dataclass(frozen=True)
class Mathematics:
    """The answer is what the last ``\\boxed{...}`` holds, else what the last ``####`` marks, else what math-verify
    finds: the last formula or number. It is right where it is the same text or exactly the same number, or where
    math-verify shows within the grader's deadline that it equals the gold one: to six places, so ``0.333333`` is 1/3.
    """

    grader: Grader

    def gold(self, cell: Any) -> str:
        text = str(cell).strip()
        found = marked(text) or text
        if len(found) > LONGEST:
            raise RewardError(f"reward 'math' reads answers of up to {LONGEST} characters, and this has {len(found)}")
        if number(found) is None and not self.grader.ask(in_latex(found)):
            raise RewardError(
                f"reward 'math' cannot parse the answer {shown(found)}",
                hint="correct it, or leave it empty, so that the reward does not apply to the row",
            )
        return found

    def right(self, gold: str, text: str) -> bool:
        found = marked(text) or (text.strip() if number(text) is not None else "")
        if len(found) > LONGEST:
            return False
        if found and (found.strip() == gold or (number(found) is not None and number(found) == number(gold))):
            return True
        if _decimal(found) and _decimal(gold):
            return False
        return bool(self.grader.ask(in_latex(gold), in_latex(found) if found else end_of(text)))


def _decimal(answer: str) -> bool:
    """Whether it is a number with finitely many decimals, which is compared exactly; not a percentage, which
    math-verify takes for its hundredth too."""
    value = number(answer)
    return value is not None and "%" not in answer and 10 ** value.denominator.bit_length() % value.denominator == 0


def in_latex(answer: str) -> str:
    r"""An answer in a form that math-verify reads as meant.

    Left to itself, it reads ``1 1/2`` as 1, ``1.5e3`` as a product with Euler's number, and a word as the product of
    its letters.

    >>> in_latex("1 1/2"), in_latex("x^2"), in_latex("Paris"), in_latex("it is $x$")
    ('\\boxed{\\frac{3}{2}}', '\\boxed{x^2}', '\\boxed{\\text{Paris}}', 'it is $x$')
    """
    answer = answer.strip()
    value = None if _DECIMAL.fullmatch(answer) or "%" in answer else number(answer)
    if value is not None:
        answer = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    elif _WORDS.fullmatch(answer):
        answer = rf"\text{{{answer}}}"
    elif _FORMULA.search(answer):
        return answer
    return rf"\boxed{{{answer}}}"


def end_of(text: str) -> str:
    """At most the last :data:`LONGEST` characters, from the beginning of a line where there is one, without the dollar
    signs that are no delimiters of formulas."""
    tail = text[-LONGEST:]
    return (tail if len(text) <= LONGEST else tail.partition("\n")[2] or tail).replace("\\$", "")


def math_(argument: str | None) -> AgainstColumn:
    """``math``, ``math:COLUMN`` or ``math:COLUMN:SECONDS``: :class:`Mathematics`, by default of the column ``answer``
    and with 5 seconds for each comparison. Needs the extra ``math``."""
    column, colon, seconds = (argument or "").partition(":")
    try:
        deadline = float(seconds) if colon else DEADLINE
    except ValueError:
        deadline = math.nan
    if not 0 < deadline <= 3600:
        raise RewardError("reward 'math' takes the seconds for a comparison after its column, such as math:answer:2")
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError("reward 'math' needs the extra: pip install 'tether-rlhf[math]'")
    return AgainstColumn("math", column or "answer", Mathematics(Grader("math", "math", deadline=deadline)))


# -- multiple choice ------------------------------------------------------------------------------------------------


class Choice:
    """The letter from A to J that a text chooses (:func:`tether.rewards.choices.choice`). A cell holds the letter, as
    ``B`` or ``(B)``, or the number of the choice, counted from 0."""

    def gold(self, cell: Any) -> str:
        letter = letter_of(cell)
        if letter is None:
            raise RewardError(
                f"reward 'multiple_choice': {shown(cell)} is no choice",
                hint="it is a letter from A to J, or a number from 0 to 9",
            )
        return letter

    def right(self, gold: str, text: str) -> bool:
        return choice(text) == gold


def multiple_choice(argument: str | None) -> AgainstColumn:
    """``multiple_choice`` or ``multiple_choice:COLUMN``: :class:`Choice`, by default of the column ``answer``."""
    return AgainstColumn("multiple_choice", argument or "answer", Choice())


# -- cosine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosine:
    r"""The cosine-scaled length reward of Yeo et al. 2025, arXiv 2502.03373: a right answer is worth more the shorter
    the completion is, a wrong one costs less the longer it was thought about.

    R = c(L, r_0, r_L),  c(L, a, b) = b + (a - b)/2 * (1 + cos(pi * L / L_max))  for L < L_max tokens,

    with r_0 = 1 and r_L = 0.5 where the answer is right, r_0 = -1 and r_L = -0.5 where it is wrong, and R = -1 for
    L >= L_max. None where the column has no answer.
    """

    longest: int
    """L_max, in tokens."""
    answer: AgainstColumn

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        right = self.answer(completions=completions, **columns)
        return [
            None if one is None else self.scaled(one, len(ids)) for one, ids in zip(right, completion_ids, strict=True)
        ]

    def scaled(self, right: float, length: int) -> float:
        if length >= self.longest:
            return -1.0
        sign = 1.0 if right else -1.0
        return sign * (0.5 + 0.25 * (1.0 + math.cos(math.pi * length / self.longest)))


def cosine(argument: str | None) -> Rule:
    """``cosine:L_MAX:RULE``, where RULE is ``exact_answer``, ``math`` or ``multiple_choice``, with its column where
    that is not ``answer``: :class:`Cosine`."""
    limit, _, spec = (argument or "").partition(":")
    name, colon, rest = spec.partition(":")
    rules = {"exact_answer": exact_answer, "math": math_, "multiple_choice": multiple_choice}
    if not re.fullmatch("[1-9][0-9]{0,8}", limit) or name not in rules:
        raise RewardError(
            "reward 'cosine' needs a length in tokens and exact_answer, math or multiple_choice, "
            "such as cosine:400:exact_answer"
        )
    return Cosine(int(limit), rules[name](rest if colon else None))
