"""What a policy acts in, when a completion is an episode (:mod:`tether.generation.episodes`)."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tether.types import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an environment shows, and what it says of the last action.

    >>> observation = Observation(text=" 5 is too low.", reward=-1.0)
    """

    text: str | Sequence[Message] = ""
    """What the policy sees next: text, which in a conversation is a turn of the user, or turns."""
    reward: float = 0.0
    """Of the last action; that of a reset is not read."""
    done: bool = False
    """Whether the episode is over; the text is then not shown."""
    info: Mapping[str, float] = field(default_factory=dict)
    """Other figures of the last action; those of an episode's last action are reported."""


class Environment(Protocol):
    """What a policy acts in: one object per episode. Both methods may be ``async``."""

    def reset(self, prompt: Prompt, *, seed: int) -> Observation | Awaitable[Observation]:
        """Begin an episode. What it shows follows the prompt; it depends on prompt and seed alone, which the episodes
        of a group have in common."""
        ...

    def step(self, action: str) -> Observation | Awaitable[Observation]:
        """What follows from what the policy said in its turn."""
        ...
