"""A step that has begun: what it rolled out, and the prompts that its unfinished update belongs to.

An update that was interrupted stays pending in the state. The step that is called again resumes it, for the same
prompts alone, and reports the rollouts that it learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from tether.algorithms.phases import PhaseClock
from tether.digests import completions_digest, prompts_digest
from tether.errors import ConfigError
from tether.figures import Figures
from tether.models.trainable import trainable
from tether.stop_requests import anywhere
from tether.types import Generator, Metrics, Prompt, ScoredGroup
from tether.world import World


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What a step rolled out. It stays in memory as long as the step's update is pending; no checkpoint holds it."""

    groups: tuple[ScoredGroup, ...]
    figures: Figures
    """Figures of the sampling."""
    clock: PhaseClock
    """The seconds of the step's phases so far."""
    drawn: tuple[int, ...] = ()
    """How many new prompts dynamic sampling took, each time. They are taken again where the step is called again, so
    that a cursor which was put back does not give them to the next step."""

    @property
    def completions(self) -> str:
        """Digest of the completions."""
        return completions_digest([group.rollouts for group in self.groups])


class Pending(Protocol):
    """An update that has begun."""

    prompts: str
    """Digest of the step's prompts."""
    completions: str
    """Digest of the completions that it learns from."""
    rollouts: Rollouts | None
    """None where it was restored from a checkpoint."""


def rollouts_of(
    pending: Pending | None, prompts: Sequence[Prompt], roll: Callable[[], Rollouts], *, where: str, world: World
) -> Rollouts:
    """The rollouts that the ``pending`` update of the step came from; without one, what ``roll`` gives.

    An update that was restored from a checkpoint rolls out again. Raises :class:`ConfigError`, and changes nothing,
    where the update belongs to other ``prompts``, or the generator gives other completions than before.
    """
    if pending is None:
        return roll()
    if world.any(pending.prompts != prompts_digest(prompts)):
        raise ConfigError(
            "an update that was interrupted is pending, and it belongs to other prompts",
            where=where,
            hint="call step with its prompts, which a cursor gives again if the step that takes them stands under "
            "'with state.cursor.rollback_on_error():', or drop the update with state.abandon()",
        )
    if pending.rollouts is None:
        rollouts = roll()
        if world.any(pending.completions != rollouts.completions):
            raise ConfigError(
                "an update that was interrupted is pending, and the generator gave other completions than those that "
                "it learns from",
                where=where,
                hint="give a generator that returns what it returned before, or drop the update with state.abandon()",
            )
        pending.rollouts = rollouts
    return pending.rollouts


def publish(generator: Generator, version: int, policy: PreTrainedModel, clock: PhaseClock) -> None:
    """Give the generator the weights that the update ended with."""
    with clock.phase("update"), anywhere():
        generator.load_weights(version, trainable(policy).items())


def evaluated(evaluate: Callable[[], Metrics] | None, clock: PhaseClock) -> Metrics:
    """The metrics of an evaluation of the new policy; empty without one."""
    if evaluate is None:
        return {}
    with clock.phase("eval"), anywhere():
        return evaluate()
