"""A proxy that rises while a judge falls: the sign of over-optimisation, where there is a judge.

A judge is a reward of weight 0, which scores every completion and trains nothing. With x_t the mean over the prompts of
step t of its score, and means over windows of :data:`WINDOW` steps, an alarm is raised once where the judge is below
its best window by more than :data:`DEVIATIONS` standard errors of the difference, and the total reward is not below
what it was then. The standard error is that of the prompts' means within the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

from tether.monitor.trace import examples, read
from tether.observers import Alarm
from tether.types import ScoredGroup, StepResult

WINDOW = 5
DEVIATIONS = 5.0
"""The best of many windows is above the mean by chance, so that a few standard errors are not enough; a test counts the
false alarms of a judge that does not change."""


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    recent: list[list[float]] = field(default_factory=list)
    """Of the last steps: total reward, judge's score, and the squared standard error of that."""
    best: list[float] = field(default_factory=list)
    """The same three of the best window so far, and its last step."""
    raised: bool = False


@dataclass(kw_only=True)
class JudgeGap:
    """Raises one alarm about one ``judge``, the name of a part of the reward."""

    judge: str
    stop: bool = False
    name: str = ""
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.name = self.name or f"judge_gap/{self.judge}"

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        state, found = self.state, self._figures(result.groups)
        if state.raised or found is None:
            return ()
        state.recent = [*state.recent, found][-WINDOW:]
        if len(state.recent) < WINDOW:
            return ()
        total, score, error = (fmean([row[i] for row in state.recent]) for i in range(3))
        error /= WINDOW
        if not state.best or score > state.best[1]:
            state.best = [total, score, error, float(step)]
            return ()
        if total < state.best[0] or state.best[1] - score <= DEVIATIONS * math.sqrt(error + state.best[2]):
            return ()
        state.raised, best_step = True, int(state.best[3])
        return [
            Alarm(
                monitor=self.name,
                message=f"{self.judge} is {score:.3g} over steps {step - WINDOW + 1} to {step}, below "
                f"{state.best[1]:.3g} over "
                f"steps {best_step - WINDOW + 1} to {best_step}, while the reward went from {state.best[0]:.3g} to "
                f"{total:.3g}",
                since=best_step,
                examples=examples(read(result)),
                advice=f"take the weights of about step {best_step} (--keep-best rewards/{self.judge}/mean), raise "
                "--kl-coef, "
                "or train the reward model on new pairs",
                stop=self.stop,
            )
        ]

    def _figures(self, groups: Sequence[ScoredGroup]) -> list[float] | None:
        """None where the judge applies to too few completions."""
        totals, scores = [], []
        for group in groups:
            both = [
                (one.total, part)
                for one in group.scores
                if one.total is not None and (part := one.parts.get(self.judge)) is not None
            ]
            if both:
                totals.append(fmean([total for total, _ in both]))
                scores.append(fmean([part for _, part in both]))
        if len(scores) < 2:
            return None
        return [fmean(totals), fmean(scores), variance(scores) / len(scores)]
