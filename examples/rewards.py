"""Custom reward functions, in TRL's signature: lists over completions in, a list of numbers out.

    tether grpo --model base --prompts examples/prompts.jsonl --reward examples/rewards.py:speech --out runs/speech

A function takes any of ``prompts``, ``completions``, ``completion_ids`` and the other columns of the prompts' file, by
name. None leaves a completion out of this reward; a list gives one reward per token.
"""

from __future__ import annotations

from typing import Any


def speech(completions: list[str], **_: Any) -> list[float]:
    """1 if the completion contains direct speech, that is, a quotation mark."""
    return [float('"' in completion) for completion in completions]


def short_words(completions: list[str], **_: Any) -> list[float | None]:
    """Minus the mean length of the words, in letters; None for a completion without words."""
    return [-sum(map(len, words)) / len(words) if (words := completion.split()) else None for completion in completions]
