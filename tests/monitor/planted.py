"""Steps of runs that are made up: random words, into which something is planted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tether.observers import Alarm, Monitor
from tether.types import Completion, FinishReason, Metrics, Prompt, RolloutGroup, Score, ScoredGroup, StepResult

WORDS = [f"w{i}" for i in range(60)]


def words_of(rng: random.Random, count: int = 12) -> str:
    """Words whose frequencies differ: the first ones are in half of all texts and more."""
    return " ".join(WORDS[min(int(rng.expovariate(0.12)), len(WORDS) - 1)] for _ in range(count))


def completion_of(text: str) -> Completion:
    count = max(1, len(text.split()))
    return Completion(
        ids=tuple(range(count)),
        mask=(True,) * count,
        sampler_logp=(0.0,) * count,
        finish_reason=FinishReason.EOS,
        text=text,
        weights_version=0,
    )


def step_of(
    texts: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float | None]] | None = None,
    *,
    metrics: Metrics | None = None,
    judge: Sequence[Sequence[float | None]] | None = None,
) -> StepResult:
    """A step from the completions of each prompt, their rewards (0 unless given) and the scores of a judge."""
    groups = []
    for i, group in enumerate(texts):
        totals = rewards[i] if rewards is not None else [0.0] * len(group)
        parts = [{"judge": score} for score in judge[i]] if judge is not None else [{}] * len(group)
        scores = tuple(Score(total=total, parts=part) for total, part in zip(totals, parts, strict=True))
        rollouts = RolloutGroup(prompt=Prompt(ids=(i,), text=f"p{i}"), completions=tuple(map(completion_of, group)))
        groups.append(ScoredGroup(rollouts=rollouts, scores=scores))
    return StepResult(metrics=metrics or {}, groups=tuple(groups))


def random_steps(
    seed: int, *, steps: int = 30, prompts: int = 8, size: int = 4, change: Callable[[int, random.Random, str], str]
) -> list[StepResult]:
    """Steps of random texts, each of which is ``change``d: step from 1, randomness, text."""
    rng = random.Random(seed)
    return [
        step_of([[change(step, rng, words_of(rng)) for _ in range(size)] for _ in range(prompts)])
        for step in range(1, steps + 1)
    ]


def unchanged(step: int, rng: random.Random, text: str) -> str:
    return text


def alarms(monitor: Monitor, steps: Sequence[StepResult]) -> list[tuple[int, Alarm]]:
    """The alarms with their steps."""
    return [(step, one) for step, result in enumerate(steps, 1) for one in monitor.watch(step, result)]
