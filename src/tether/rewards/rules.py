"""The table of built-in rewards: each rule is made from its argument, and is a function in TRL's signature."""

from __future__ import annotations

from collections.abc import Callable

from tether.names import closest, did_you_mean
from tether.rewards.answer_rules import cosine, exact_answer, math_, multiple_choice
from tether.rewards.length_rules import length, overlong
from tether.rewards.reasoning import reasoning_gym
from tether.rewards.text_rules import Rule, format_, json_schema, regex, repetition, sentiment

RULES: dict[str, Callable[[str | None], Rule]] = {
    "length": length,
    "overlong": overlong,
    "repetition": repetition,
    "format": format_,
    "regex": regex,
    "json_schema": json_schema,
    "sentiment": sentiment,
    "exact_answer": exact_answer,
    "math": math_,
    "multiple_choice": multiple_choice,
    "cosine": cosine,
    "reasoning_gym": reasoning_gym,
}
"""What ``--reward NAME`` or ``NAME:ARGUMENT`` finds."""

MEANINGS = {
    "length": ("length:N", "0 at N tokens, less the further from it"),
    "overlong": ("overlong:N:CACHE", "0 up to N - CACHE tokens, down to -1 at N"),
    "repetition": ("repetition", "minus the share of repeated word n-grams"),
    "format": ("format:REGEX", "1 where all of the text matches, else 0"),
    "regex": ("regex:REGEX", "1 where any part of the text matches, else 0"),
    "json_schema": ("json_schema:FILE.json", "1 where the text is JSON that the schema allows, else 0"),
    "sentiment": ("sentiment", "from -1, negative, to 1, positive, by VADER"),
    "exact_answer": ("exact_answer:COLUMN", "1 where the final answer is that of the column, else 0"),
    "math": ("math:COLUMN", "1 where math-verify shows that the answer equals that of the column, else 0"),
    "multiple_choice": ("multiple_choice:COLUMN", "1 where the letter chosen is that of the column, else 0"),
    "cosine": ("cosine:N:RULE", "a rule that compares answers, scaled by the length, up to N tokens"),
    "reasoning_gym": ("reasoning_gym", "the score of that library for its own problems"),
}
"""How each rule is written, and what it gives."""

TAKES_TEXT = frozenset({"format", "regex"})
"""Rules whose argument may hold any text, also ``=``."""
TAKES_FILE = frozenset({"json_schema"})
"""Rules whose argument is the path of a file."""


def rules_like(name: str) -> str:
    """Advice for ``name``, which is no rule: the closest one, and all of them with their meaning."""
    listed = ", ".join(f"{form} ({meaning})" for form, meaning in MEANINGS.values())
    return f"{did_you_mean(closest(name, list(RULES)))} the rules are {listed}".lstrip()
