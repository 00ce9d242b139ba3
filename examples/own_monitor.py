"""A monitor of one's own in a run of GRPO: an alarm where completions shrink, and an early end. Under 20 seconds on two
CPU cores.

python examples/own_monitor.py [STEPS]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tether

HERE = Path(__file__).parent


def brief(completions: list[str]) -> list[float]:
    """More reward for fewer words."""
    return [-len(completion.split()) / 10 for completion in completions]


@dataclass
class Seen:
    """What the monitor remembers; a checkpoint holds it, so that a resumed run goes on from there."""

    first: float = 0.0
    """Mean length of the first step's completions."""


@dataclass
class Shrinking:
    """Raises an alarm below 80% of the first step's length, and ends the run below 60%."""

    name: str = "shrinking"
    state: Seen = field(default_factory=Seen)

    def watch(self, step: int, result: tether.StepResult) -> Sequence[tether.Alarm | tether.Stop]:
        """Called after each step, before it is recorded."""
        length = result.metrics["completions/mean_length"]
        self.state.first = self.state.first or length
        share = length / self.state.first
        found = f"at step {step} completions have {share:.0%} of their first length"
        if share < 0.6:
            return [tether.Stop(reason=found)]
        return [tether.Alarm(monitor=self.name, message=found)] if share < 0.8 else []


def main(steps: int = 12) -> None:
    run = tether.grpo.run(
        model="base",
        prompts=str(HERE / "prompts.jsonl"),
        rewards=brief,
        monitors=[Shrinking()],
        steps=steps,
        group_size=4,
        prompts_per_step=8,
        max_new_tokens=20,
        kl_coef=0.02,
        learning_rate=2e-3,
        quiet=True,
    )
    for row in run.metrics:
        print(f"step {row['step']:2.0f}  reward {row['reward']:+.2f}  length {row['completions/mean_length']:.1f}")
    print("ended:", run.summary["ended"] or "after its last step")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
