"""The reward ``reasoning_gym``: what the library reasoning-gym says of an answer to one of its problems, 0 to 1."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tether.errors import RewardError
from tether.rewards.answers import marked
from tether.rewards.text_rules import Rule, text_of
from tether.untrusted import shown

COLUMN = "entry"
"""The column that :mod:`tether.environments.reasoning` makes."""
RUNS_ANSWERS = frozenset(
    {
        "binary_matrix", "bitwise_arithmetic", "codeio", "composite", "countdown", "intermediate_integration",
        "n_queens", "number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
        "string_insertion",
    }
)  # fmt: skip
"""Tasks whose scorers hand the answer or the row to ``eval``, ``exec`` or sympy's parser, which run it; mixtures."""
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def library() -> Any:
    """The library. Raises :class:`RewardError` where it is missing."""
    try:
        import reasoning_gym
    except ImportError:
        raise RewardError("reasoning-gym needs the extra: pip install 'tether-rlhf[reasoning]'") from None
    return reasoning_gym


def require_safe(task: str) -> None:
    """Raise :class:`RewardError` where the library would run what a model writes."""
    if task in RUNS_ANSWERS:
        raise RewardError(
            f"the library's scorer of the task {task!r} runs what a model writes as code", hint="choose another task"
        )


def answer_in(text: str) -> str:
    """What the last ``<answer>`` holds, else what ``\\boxed{}`` or ``####`` marks, else the whole text.

    >>> answer_in("So <answer> 12 </answer>."), answer_in("#### 7"), answer_in(" yes ")
    ('12', '7', 'yes')
    """
    tagged = _TAGGED.findall(text)
    return str(tagged[-1]) if tagged else marked(text) or text.strip()


def reasoning_gym(argument: str | None) -> Rule:
    """``reasoning_gym``: the library's score of the answer to the problem in the column ``entry``."""
    if argument is not None:
        raise RewardError(f"reward 'reasoning_gym' takes no argument, found {argument!r}")
    gym = library()

    def rule(completions: Sequence[Any], **columns: Any) -> list[float]:
        if COLUMN not in columns:
            raise RewardError(
                "reward 'reasoning_gym' needs the column 'entry' in the prompts", hint="--prompts reasoning-gym:TASK"
            )
        return [
            scored(gym, answer_in(text_of(completion)), cell)
            for completion, cell in zip(completions, columns[COLUMN], strict=True)
        ]

    return rule


def scored(gym: Any, answer: str, cell: Any) -> float:
    """The library's score of an ``answer`` to the problem in ``cell``."""
    try:
        entry = json.loads(cell)
        task = entry["metadata"]["source_dataset"]
    except (TypeError, ValueError, KeyError):
        raise RewardError(f"reward 'reasoning_gym': {shown(cell)} is no problem of reasoning-gym") from None
    require_safe(str(task))
    score = gym.get_score_answer_fn(task)
    try:
        return float(score(answer=answer, entry=entry))
    except Exception:
        # some scorers raise where they cannot read an answer: it is wrong, if they can read the right one
        try:
            score(answer=str(entry["answer"]), entry=entry)
        except Exception as error:
            raise RewardError(
                f"reward 'reasoning_gym': the scorer of {task!r} raised {type(error).__name__}: {shown(error, str)}"
            ) from error
        return 0.0
