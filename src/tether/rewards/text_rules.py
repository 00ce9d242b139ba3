"""Built-in rewards for what a completion's text is like, whatever the right answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tether.errors import RewardError
from tether.rewards.grader import DEADLINE, Grader
from tether.untrusted import shown

Rule = Callable[..., Sequence[float | None]]


def text_of(completion: Any) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def count(text: str) -> int | None:
    """The positive number of at most nine digits that ``text`` is, or None."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) and int(text) > 0 else None


def repetition(argument: str | None) -> Rule:
    """``repetition`` or ``repetition:n``: minus the share of repeated word n-grams (n = 3); 0 where none repeats."""
    n = 3 if argument is None else count(argument)
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


@dataclass(frozen=True)
class Checked:
    """1 where the grader says yes of a completion's text, else 0.

    Where it does not say within its deadline, the reward fails: what it checks is for the user to make fast enough.
    """

    grader: Grader
    advice: str
    stripped: bool = False
    """Whether the grader is asked of the text without outer white space."""

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [self.of(text_of(completion)) for completion in completions]

    def of(self, text: str) -> float:
        said = self.grader.ask(text.strip() if self.stripped else text)
        if said is None:
            raise RewardError(
                f"reward {self.grader.rule!r} took longer than {self.grader.deadline:g} s for the completion "
                f"{shown(text)}",
                hint=self.advice,
            )
        return float(said)


def format_(argument: str | None) -> Rule:
    """``format:REGEX``: 1 where the whole completion, without outer white space, matches, else 0."""
    if argument is None:
        raise RewardError("reward 'format' needs a regular expression, such as 'format:<think>.*</think>.*'")
    return pattern("format", argument, "fullmatch")


def regex(argument: str | None) -> Rule:
    """``regex:REGEX``: 1 where any part of the completion matches, else 0."""
    if argument is None:
        raise RewardError(r"reward 'regex' needs a regular expression, such as 'regex:\\boxed\{.+\}'")
    return pattern("regex", argument, "search")


def pattern(rule: str, text: str, how: Literal["fullmatch", "search"], *, deadline: float = DEADLINE) -> Checked:
    """Whether completions match; ``.`` matches line breaks too."""
    try:
        re.compile(text, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise RewardError(f"reward {rule!r}: {shown(text)} is not a regular expression ({error})") from None
    advice = "the regular expression backtracks: avoid a repeat within a repeat, such as (a+)+"
    return Checked(Grader(rule, how, text, deadline=deadline), advice, stripped=how == "fullmatch")


def json_schema(argument: str | None) -> Rule:
    """``json_schema:FILE.json``: 1 where the completion, or else the last block that it fences by ```` ``` ````, is
    JSON that the schema in FILE allows, else 0.

    Needs the extra ``json``. References to other documents are not followed.
    """
    if argument is None:
        raise RewardError("reward 'json_schema' needs a file with a JSON schema, such as json_schema:person.json")
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
    except ImportError:
        raise RewardError("reward 'json_schema' needs the extra: pip install 'tether-rlhf[json]'") from None
    try:
        text = Path(argument).read_text(encoding="utf-8")
        schema = json.loads(text)
        if not isinstance(schema, bool | dict):
            raise ValueError("a schema is an object")
        validator_for(schema).check_schema(schema)
    except OSError as error:
        raise RewardError(f"reward 'json_schema' cannot read its file ({error.strerror})", where=argument) from None
    except (ValueError, RecursionError, SchemaError) as error:
        raise RewardError(
            f"reward 'json_schema': not a JSON schema ({shown(getattr(error, 'message', error), str)})", where=argument
        ) from None
    return Checked(Grader("json_schema", "schema", text), "simplify its patterns, or what it repeats")


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
