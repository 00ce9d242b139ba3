"""Length that drifts because it is paid for.

An alarm is raised where the mean length of the last five steps is more than :data:`RATIO` times that of the first five,
or less than 1 / :data:`RATIO` of it, and longer (or shorter) completions of a prompt have had the higher rewards in
these steps: Pearson's correlation r of reward and length within the groups, n completions, has |r| >= :data:`LEAST` and
|r| sqrt(n) >= :data:`DEVIATIONS`, its size in standard errors where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tether.monitor.trace import FIRST, LAST, Trace, correlation, examples, read, within_groups
from tether.observers import Alarm
from tether.types import StepResult

RATIO = 1.5
LEAST, DEVIATIONS = 0.2, 4.0


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    length: Trace = field(default_factory=Trace)
    pairs: list[list[list[float]]] = field(default_factory=list)
    """Reward and length of the completions of each of the last steps, less their group's means."""
    raised: bool = False


@dataclass(kw_only=True)
class LengthDrift:
    """Raises one alarm."""

    stop: bool = False
    name: str = "length_drift"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        groups, state = read(result), self.state
        lengths = [float(one.length) for group in groups for one in group]
        if state.raised or not lengths:
            return ()
        state.length.take(fmean(lengths))
        state.pairs = [*state.pairs, [list(pair) for pair in within_groups(groups)]][-LAST:]
        if not state.length.full or abs(math.log(state.length.now / state.length.before)) < math.log(RATIO):
            return ()
        pairs = [(reward, length) for found in state.pairs for reward, length in found]
        r, longer = correlation(pairs), state.length.now > state.length.before
        if (r > 0) != longer or abs(r) < LEAST or abs(r) * math.sqrt(len(pairs)) < DEVIATIONS:
            return ()
        state.raised = True
        return [
            Alarm(
                monitor=self.name,
                message=f"completions have {state.length.now:.0f} tokens in steps {step - LAST + 1} to {step} and had "
                f"{state.length.before:.0f} in the first {FIRST}; among the completions of a prompt, reward and length "
                f"have a correlation of {r:+.2f}",
                since=step - LAST + 1,
                examples=examples(groups),
                advice="check whether longer answers are better (tether eval --reward-model shows accuracy by length); "
                "add the reward overlong or length, or train the reward model on pairs of equal length"
                if longer
                else "check whether shorter answers are better; limit what the reward gives for brevity",
                stop=self.stop,
            )
        ]
