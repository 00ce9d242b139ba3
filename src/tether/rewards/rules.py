"""Built-in rewards: each rule is made from its argument, and is a function in TRL's signature."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import RewardError
from tether.names import closest, did_you_mean
from tether.rewards.answers import Answer, canonical, final_answer, marked
from tether.untrusted import shown

Rule = Callable[..., Sequence[float | None]]


def text_of(completion: Any) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _count(text: str) -> int | None:
    """The positive number of at most nine digits that ``text`` is, or None."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) and int(text) > 0 else None


def length(argument: str | None) -> Rule:
    """``length:N``: -|tokens - N| / N, which is 0 at N tokens, and -1 at 0 and 2 N."""
    target = _count(argument or "")
    if target is None:
        raise RewardError("reward 'length' needs a target in tokens, such as length:40")

    def rule(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-abs(len(ids) - target) / target for ids in completion_ids]

    return rule


def repetition(argument: str | None) -> Rule:
    """``repetition`` or ``repetition:n``: minus the share of repeated word n-grams (n = 3); 0 where none repeats."""
    n = 3 if argument is None else _count(argument)
    if n is None:
        raise RewardError("reward 'repetition' takes the length of its word n-grams, such as repetition:2")

    def rule(completions: Sequence[Any], **_: Any) -> list[float]:
        return [distinct(text_of(completion), n) - 1.0 for completion in completions]

    return rule


def distinct(text: str, n: int) -> float:
    """Distinct word n-grams / word n-grams, 1 where there are none: distinct-1 and distinct-2 of Li et al. 2016."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def format_(argument: str | None) -> Rule:
    """``format:REGEX``: 1 where the whole completion, without outer white space, matches, else 0."""
    if argument is None:
        raise RewardError("reward 'format' needs a regular expression, such as 'format:<think>.*</think>.*'")
    try:
        pattern = re.compile(argument, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise RewardError(f"reward 'format': {shown(argument)} is not a regular expression ({error})") from None

    def rule(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(bool(pattern.fullmatch(text_of(completion).strip()))) for completion in completions]

    return rule


def sentiment(argument: str | None) -> Rule:
    """``sentiment`` or ``sentiment:negative``: VADER's compound score in [-1, 1] (Hutto and Gilbert 2014), or minus it.

    The lexicon holds the mean of ten people's ratings per word; nothing in it was trained.
    """
    if argument not in (None, "positive", "negative"):
        raise RewardError(f"reward 'sentiment' takes 'positive' or 'negative', not {argument!r}")
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise RewardError("reward 'sentiment' needs the extra: pip install 'tether-rlhf[sentiment]'") from None
    analyser = SentimentIntensityAnalyzer()
    sign = -1.0 if argument == "negative" else 1.0

    def rule(completions: Sequence[Any], **_: Any) -> list[float]:
        return [sign * analyser.polarity_scores(text_of(completion))["compound"] for completion in completions]

    return rule


@dataclass(frozen=True)
class ExactAnswer:
    """1 where the final answer is that of the column, 0 where it is another, None where the column has none.

    The final answer is what the last ``\\boxed{...}`` holds, else what the last ``####`` marks, else, in a completion,
    the last number, else the whole text. Numbers and fractions are compared exactly, however they are written, and
    anything else as text without case and outer white space (:mod:`tether.rewards.answers`).
    """

    column: str = "answer"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if self.column not in columns:
            raise RewardError(f"reward 'exact_answer' needs the column {self.column!r} in the prompts")
        return [
            None if _missing(answer) else float(final_answer(text_of(completion)) == expected_answer(str(answer)))
            for completion, answer in zip(completions, columns[self.column], strict=True)
        ]


def exact_answer(argument: str | None) -> Rule:
    """``exact_answer`` or ``exact_answer:COLUMN``: :class:`ExactAnswer`, by default of the column ``answer``."""
    return ExactAnswer(argument or "answer")


def expected_answer(answer: str) -> Answer:
    """The answer that a cell of the column holds: what it marks, as a worked solution does, or else all of it."""
    return canonical(marked(answer) or answer)


def _missing(answer: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that stands for it in a column of numbers."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


RULES: dict[str, Callable[[str | None], Rule]] = {
    "length": length,
    "repetition": repetition,
    "format": format_,
    "sentiment": sentiment,
    "exact_answer": exact_answer,
}
"""What ``--reward NAME`` or ``NAME:ARGUMENT`` finds."""

MEANINGS = {
    "length": ("length:N", "0 at N tokens, less the further from it"),
    "repetition": ("repetition", "minus the share of repeated word n-grams"),
    "format": ("format:REGEX", "1 where all of the text matches, else 0"),
    "sentiment": ("sentiment", "from -1, negative, to 1, positive, by VADER"),
    "exact_answer": ("exact_answer:COLUMN", "1 where the final answer is that of the column, else 0"),
}
"""How each rule is written, and what it gives."""


def rules_like(name: str) -> str:
    """Advice for ``name``, which is no rule: the closest one, and all of them with their meaning."""
    listed = ", ".join(f"{form} ({meaning})" for form, meaning in MEANINGS.values())
    return f"{did_you_mean(closest(name, list(RULES)))} the rules are {listed}".lstrip()
