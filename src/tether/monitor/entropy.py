"""Entropy that is gone: the policy hardly explores any more.

An alarm is raised once, where the mean entropy of the last five steps is below :data:`SHARE` of that of the first five.
A task whose best answer is certain ends there too; then the reward has stopped to rise because it is solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tether.monitor.trace import FIRST, LAST, Trace, examples, read
from tether.observers import Alarm
from tether.types import StepResult

SHARE = 0.1


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    entropy: Trace = field(default_factory=Trace)
    raised: bool = False


@dataclass(kw_only=True)
class EntropyCollapse:
    """Raises one alarm."""

    stop: bool = False
    name: str = "entropy_collapse"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        trace = self.state.entropy
        if self.state.raised or "entropy" not in result.metrics:
            return ()
        trace.take(result.metrics["entropy"])
        if not trace.full or trace.now >= SHARE * trace.before:
            return ()
        self.state.raised = True
        return [
            Alarm(
                monitor=self.name,
                message=f"entropy is {trace.now:.3f} nats per token in steps {step - LAST + 1} to {step} and was "
                f"{trace.before:.3f} in the first {FIRST}",
                since=step - LAST + 1,
                examples=examples(read(result)),
                advice="if the task is not solved: add an entropy bonus (--entropy-coef), lower --learning-rate, or "
                "raise "
                "--kl-coef",
                stop=self.stop,
            )
        ]
