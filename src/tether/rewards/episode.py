"""What an environment said of an episode, as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tether.rewards.combine import Judgement
from tether.types import Completion, RolloutGroup


@dataclass(frozen=True)
class EpisodeReward:
    """A :class:`tether.rewards.combine.Reward`: that of each turn, at the turn's last token.

    Its members are the figures that the environment gave with the last turn (``info``).
    """

    name: str

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        return [[judgement(completion) for completion in group.completions] for group in groups]


def judgement(completion: Completion) -> Judgement:
    """One number per token; None of a completion that is no episode."""
    if not completion.turns:
        return Judgement(None)
    rewards = [0.0] * len(completion.ids)
    for turn in completion.turns:
        rewards[turn.stop - 1] = turn.reward
    info = completion.turns[-1].info
    return Judgement(tuple(rewards), parts={name: float(value) for name, value in info.items()})
