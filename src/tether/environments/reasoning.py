"""Tasks of the library reasoning-gym as rows: ``--prompts reasoning-gym:leg_counting,count=500,seed=1``.

Each row has the question as its prompt, the library's ``answer``, and its whole ``entry`` as JSON, by which the reward
``reasoning_gym`` scores a completion (:mod:`tether.rewards.reasoning`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tether.names import closest, did_you_mean
from tether.rewards.reasoning import library, require_safe


def rows(*, task: str, count: int, seed: int) -> Sequence[dict[str, Any]]:
    """``count`` problems of a task. Raises :class:`ValueError` where the library has no such task or it cannot be made,
    and :class:`tether.errors.RewardError` where the library is missing or would run what a model writes."""
    gym = library()
    require_safe(task)
    try:
        data = gym.create_dataset(task, size=count, seed=seed)
        entries = [data[i] for i in range(count)]
    except ValueError as error:
        if task not in gym.factory.DATASETS:
            advice = did_you_mean(closest(task, list(gym.factory.DATASETS)))
            raise ValueError(f"reasoning-gym has no task {task!r}; {advice}".rstrip("; ")) from None
        raise ValueError(f"reasoning-gym: {error}") from None
    for entry in entries:
        require_kept(gym, task, entry)
    return [
        {"prompt": entry["question"], "answer": str(entry["answer"]), "entry": json.dumps(entry, default=str)}
        for entry in entries
    ]


def require_kept(gym: Any, task: str, entry: dict[str, Any]) -> None:
    """Raise :class:`ValueError` where a problem is not scored alike once it has been text."""
    score, own = gym.get_score_answer_fn(task), str(entry["answer"])
    kept = json.loads(json.dumps(entry, default=str))
    try:
        same = score(answer=own, entry=kept) == score(answer=own, entry=entry)
    except Exception:
        same = False
    if not same or entry["answer"] is None:
        raise ValueError(f"reasoning-gym: problems of {task!r} cannot be kept as rows: their answers are no text")
