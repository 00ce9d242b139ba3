"""KL that runs away: it grows much faster than it did.

An alarm is raised once, where the KL per completion grew in the last five steps by more than :data:`FASTER` times what
it grew in the five before, and by more than :data:`NATS`. A limit is ``--stop-kl``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tether.monitor.trace import LAST
from tether.observers import Alarm
from tether.types import StepResult

FASTER, NATS = 3.0, 5.0


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    recent: list[float] = field(default_factory=list)
    """The KL of the last steps, oldest first."""
    raised: bool = False


@dataclass(kw_only=True)
class KLRunaway:
    """Raises one alarm."""

    stop: bool = False
    name: str = "kl_runaway"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        state = self.state
        if state.raised or "kl" not in result.metrics:
            return ()
        recent = state.recent = [*state.recent, result.metrics["kl"]][-(2 * LAST + 1) :]
        if len(recent) < 2 * LAST + 1:
            return ()
        before, now = recent[LAST] - recent[0], recent[-1] - recent[LAST]
        if now < NATS or now < FASTER * max(before, 1.0):
            return ()
        state.raised = True
        return [
            Alarm(
                monitor=self.name,
                message=f"the KL grew by {now:.1f} nats per completion in the last {LAST} steps, to {recent[-1]:.1f}, "
                "and by "
                f"{before:.1f} in the {LAST} before",
                since=step - LAST,
                advice="lower --learning-rate, raise --kl-coef, or set a limit (--stop-kl)",
                stop=self.stop,
            )
        ]
