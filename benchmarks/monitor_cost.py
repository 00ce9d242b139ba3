"""What the usual monitors take per step.

    python -m benchmarks.monitor_cost

Made-up steps of random words; the median of ten steps after the first ten, in milliseconds.
"""

from __future__ import annotations

import random
import statistics
import time

from tether.monitor.usual import usual_monitors
from tether.types import Completion, FinishReason, Prompt, RolloutGroup, Score, ScoredGroup, StepResult

SIZES = ((8, 8, 24), (64, 8, 400))
"""Prompts, completions per prompt, words per completion."""
WORDS = [f"w{i}" for i in range(5000)]


def step_of(rng: random.Random, prompts: int, size: int, count: int) -> StepResult:
    """Words as frequent as in English, about: the i-th in proportion to 1 / i (Zipf)."""
    weights = [1 / (i + 1) for i in range(len(WORDS))]
    groups = []
    for number in range(prompts):
        completions = tuple(
            Completion(
                ids=tuple(range(count)),
                mask=(True,) * count,
                sampler_logp=(0.0,) * count,
                finish_reason=FinishReason.EOS,
                text=" ".join(rng.choices(WORDS, weights, k=count)),
                weights_version=0,
            )
            for _ in range(size)
        )
        rollouts = RolloutGroup(prompt=Prompt(ids=(number,), text=f"p{number}"), completions=completions)
        scores = tuple(Score(total=rng.random(), parts={"judge": rng.random()}) for _ in range(size))
        groups.append(ScoredGroup(rollouts=rollouts, scores=scores))
    return StepResult(metrics={"reward": 0.5, "kl": 1.0, "entropy": 2.0}, groups=tuple(groups))


def main() -> None:
    for prompts, size, count in SIZES:
        rng, monitors, taken = random.Random(0), usual_monitors(judges=["judge"], compares=True), []
        for step in range(1, 21):
            result = step_of(rng, prompts, size, count)
            begun = time.perf_counter()
            for monitor in monitors:
                monitor.watch(step, result)
            taken.append(1000 * (time.perf_counter() - begun))
        print(f"{prompts} x {size} completions of {count} words: {statistics.median(taken[10:]):.1f} ms per step")


if __name__ == "__main__":
    main()
