"""Reward functions of one's own, in TRL's signature: lists over completions in, a list of numbers out.

    tether grpo --model base --prompts examples/prompts.jsonl --reward examples/rewards.py:speech --out runs/speech

``prompts``, ``completions``, ``completion_ids`` and every other column of the prompts' file can be asked for by name.
None leaves a completion out of this reward; a list gives a reward to each of its tokens.
"""

from __future__ import annotations

from typing import Any


def speech(completions: list[str], **_: Any) -> list[float]:
    """1 where somebody speaks, that is, where the completion holds a quotation mark."""
    return [float('"' in completion) for completion in completions]


def short_words(completions: list[str], **_: Any) -> list[float | None]:
    """Minus the mean length of the words, in letters; a completion without a word is not judged."""
    return [-sum(map(len, words)) / len(words) if (words := completion.split()) else None for completion in completions]
