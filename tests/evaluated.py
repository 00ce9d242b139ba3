"""Run directories with held-out completions whose scores are given."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from commandline import write_rows
from helpers import group
from tether.evaluation import write_evaluation
from tether.types import RolloutGroup, Score, ScoredGroup

Scores = Mapping[str, Sequence[float | None]]
"""Prompt to the score of each of its completions."""


def groups_of(scores: Scores, *, judge: Scores | None = None, text: str = "said") -> list[ScoredGroup]:
    """One group per prompt; the score is that of the reward ``fn``, and ``judge`` another part."""
    made = []
    for prompt, row in scores.items():
        rollouts: RolloutGroup = group([0, 5], [[7, 1]] * len(row), text=prompt)
        parts = [{"fn": one} | ({"judge": judge[prompt][i]} if judge else {}) for i, one in enumerate(row)]
        found = tuple(Score(total=one, parts=part) for one, part in zip(row, parts, strict=True))
        made.append(ScoredGroup(rollouts=rollouts, scores=found))
    return made


def evaluated_run(
    path: Path,
    policy: Scores,
    reference: Scores,
    *,
    judge: Scores | None = None,
    kl: float = 1.0,
    seed: int = 0,
    rows: Sequence[Mapping[str, float]] = (),
    **config: object,
) -> Path:
    """A finished run with the reward ``r.py:fn``, whose policy has these scores on held-out prompts."""
    path.mkdir(parents=True)
    options = {"command": "grpo", "reward": ["r.py:fn"], "out": str(path), **config}
    (path / "config.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in options.items()))
    write_rows(path / "metrics.jsonl", [dict(row) for row in rows])
    (path / "summary.json").write_text(json.dumps({"seconds": 41.0}))
    groups = groups_of(policy, judge=judge)
    known = {prompt: [0.0] * len(row) for prompt, row in reference.items()} if judge else None
    count = sum(len(one.scores) for one in groups)
    write_evaluation(path, groups, groups_of(reference, judge=known), [kl] * count, seed=seed)
    return path


def flat_scores(level: float, *, prompts: int = 16, spread: float = 0.1) -> dict[str, list[float]]:
    """Two completions of each prompt, whose mean is ``level`` or half a ``spread`` above or below it."""
    return {f"p{i}": [level + spread, level - spread + spread * (i % 3 - 1)] for i in range(prompts)}


def noisy_scores(level: float, seed: int, *, prompts: int = 16) -> dict[str, list[float]]:
    """Two completions of each prompt, with normal scores around ``level``."""
    draw = random.Random(seed)
    return {f"p{i}": [draw.gauss(level, 0.1) for _ in range(2)] for i in range(prompts)}
