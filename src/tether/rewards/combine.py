"""Several rewards as one scorer: weighted, added up, and each reported on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeVar

from tether.errors import RewardError
from tether.rewards.ahead import Ahead, collected
from tether.rewards.waiting import Waiting, together
from tether.types import Completion, Prompt, RolloutGroup, Score, ScoredGroup
from tether.untrusted import shown

T = TypeVar("T")

RewardValue = float | tuple[float, ...] | None
"""What a reward says of one completion: a number, one number per token, or None where it does not apply."""


@dataclass(frozen=True)
class Judgement:
    """What one reward says of one completion.

    >>> judgement = Judgement(0.5, parts={"helpful": 0.7, "harmless": 0.3})
    """

    value: RewardValue
    """Numbers per token have one entry per token of ``completion.ids``, 0 where ``completion.mask`` is False."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """What the members of an ensemble said, by their names; None where a member does not apply."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the call, or of this completion; the step's are the means over its completions."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """What was logged for this completion (:mod:`tether.rewards.logged`)."""


NOTHING_AHEAD: Mapping[int, Ahead[list[Judgement]]] = MappingProxyType({})


class Reward(Protocol):
    """One source of reward.

    One that waits for something elsewhere may also have ``waiting(groups)``, which gives the call as a
    :class:`tether.rewards.waiting.Waiting`, or None where there is nothing to wait for; such rewards wait at the same
    time.
    """

    @property
    def name(self) -> str: ...

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        """One judgement per completion of each group. Raises :class:`RewardError` where it cannot give one."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """A :class:`tether.types.Scorer`: total = sum over rewards of weight * value, without those that do not apply, and
    None where none applies.

    Token rewards add up token by token; a reward that gives one number then adds it to the last token that the policy
    emitted. The parts of a score are each reward's own value under its name, and what its members said under
    ``NAME/MEMBER``. A judgement that lacks a member which the reward's other judgements have counts as None there.
    """

    rewards: tuple[tuple[Reward, float], ...]
    ahead: Mapping[int, Ahead[list[Judgement]]] = field(default_factory=dict, compare=False)
    """The rewards, by their place, that are asked about groups before all are sampled (:meth:`asking_ahead`)."""

    def __post_init__(self) -> None:
        require_distinct([reward.name for reward, _ in self.rewards])
        if not self.rewards:
            raise RewardError("no reward given", hint="add --reward")

    def asking_ahead(self) -> WeightedSum:
        """The same, where :meth:`begin` asks the rewards that wait for something elsewhere about a group at once."""
        found = {
            i: Ahead(reward.name, partial(ask, reward)) for i, (reward, _) in enumerate(self.rewards) if waits(reward)
        }
        return replace(self, ahead=found)

    def begin(self, group: RolloutGroup) -> None:
        """A group has been sampled, and others are not yet."""
        for line in self.ahead.values():
            line.begin(group)

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        by_reward = judged_by([reward for reward, _ in self.rewards], groups, self.ahead)
        members = [list(dict.fromkeys(m for row in rows for one in row for m in one.parts)) for rows in by_reward]
        return [
            ScoredGroup(
                rollouts=group,
                scores=tuple(
                    self._total([rows[i][j] for rows in by_reward], members, completion, group.prompt.text)
                    for j, completion in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]

    def _total(
        self, judgements: Sequence[Judgement], members: Sequence[Sequence[str]], completion: Completion, prompt: str
    ) -> Score:
        """The score of one completion; ``members`` are those of each reward."""
        which = f"a completion of the prompt {prompt[:60]!r}"
        parts: dict[str, float | None] = {}
        per_token = [0.0] * len(completion.ids)
        dense = False
        for (reward, weight), judgement, names in zip(self.rewards, judgements, members, strict=True):
            value = judgement.value
            if isinstance(value, tuple):
                require_token_rewards(reward.name, value, completion, which)
                dense = True
                parts[reward.name] = sum(value)
                per_token = [a + weight * b for a, b in zip(per_token, value, strict=True)]
            else:
                parts[reward.name] = value
                if value is not None:
                    per_token[completion.last_emitted] += weight * value
            parts |= {f"{reward.name}/{member}": judgement.parts.get(member) for member in names}
        logged = {name: value for one in judgements for name, value in one.logged.items()}
        extra = {name: value for one in judgements for name, value in one.extra.items()}
        if all(judgement.value is None for judgement in judgements):
            return Score(total=None, parts=parts, logged=logged, extra=extra)
        try:
            total = math.fsum(per_token)
        except (OverflowError, ValueError):  # finite numbers with an infinite sum, and infinities of either sign
            total = math.inf
        if not math.isfinite(total):
            raise RewardError(f"the rewards of {which} add up to more than a float can hold")
        tokens = tuple(per_token) if dense else None
        return Score(total=total, parts=parts, token_rewards=tokens, logged=logged, extra=extra)


def flattened(groups: Sequence[RolloutGroup]) -> list[tuple[Prompt, Completion]]:
    """Every completion with its prompt."""
    return [(group.prompt, completion) for group in groups for completion in group.completions]


def regrouped(rows: Sequence[T], groups: Sequence[RolloutGroup]) -> list[list[T]]:
    """What there is for each of the completions of :func:`flattened`, per group."""
    found = iter(rows)
    return [[next(found) for _ in group.completions] for group in groups]


def judged_by(
    rewards: Sequence[Reward],
    groups: Sequence[RolloutGroup],
    ahead: Mapping[int, Ahead[list[Judgement]]] = NOTHING_AHEAD,
) -> list[list[list[Judgement]]]:
    """What each of ``rewards`` says: first those that compute, one after the other, then together those that wait, so
    that no server is asked about a step that another reward cannot score; some may have been asked ``ahead``."""
    others = {i: reward for i, reward in enumerate(rewards) if i not in ahead}
    waiting = {i: call for i, reward in others.items() if (call := waiting_of(reward, groups)) is not None}
    try:
        rows = {i: reward.judge(groups) for i, reward in others.items() if i not in waiting}
        rows |= zip(waiting, together(list(waiting.values())), strict=True)
        rows |= zip(ahead, collected(list(ahead.values()), groups), strict=True)
    finally:
        for line in ahead.values():
            line.clear()
    return [checked(reward, rows[i], groups) for i, reward in enumerate(rewards)]


def waits(reward: Reward) -> bool:
    """Whether a reward waits for something elsewhere, and does not compute."""
    return waiting_of(reward, ()) is not None


def waiting_of(reward: Reward, groups: Sequence[RolloutGroup]) -> Waiting[list[list[Judgement]]] | None:
    """The call of a reward that waits for something elsewhere; None for one that computes."""
    found = getattr(reward, "waiting", None)
    return None if found is None else found(groups)


def ask(reward: Reward, groups: Sequence[RolloutGroup]) -> Waiting[list[list[Judgement]]]:
    """The call of a reward that waits."""
    call = waiting_of(reward, groups)
    assert call is not None
    return call


def checked(reward: Reward, rows: list[list[Judgement]], groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
    """What ``reward`` said, or a :class:`RewardError` where that is not one judgement per completion, or a member's
    name or number is not usable."""
    found, wanted = [len(row) for row in rows], [len(group.completions) for group in groups]
    if found != wanted:
        raise RewardError(f"reward {reward.name!r} gave judgements for {found} completions per group, not {wanted}")
    for judgement in (judgement for row in rows for judgement in row):
        if not isinstance(judgement, Judgement):
            raise RewardError(f"reward {reward.name!r} gave {shown(judgement)}, which is no Judgement")
        value = judgement.value
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise RewardError(
                f"reward {reward.name!r} gave the value {shown(value)}",
                hint="a value is a finite number, a tuple of one per token, or None",
            )
        for member, value in judgement.parts.items():
            if not member or "/" in member:
                raise RewardError(f"reward {reward.name!r} has a member named {member!r}; a name has no '/'")
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise RewardError(
                    f"the member {member!r} of reward {reward.name!r} gave {shown(value)}, no finite number"
                )
    return rows


def require_distinct(names: Sequence[str]) -> None:
    """Raise :class:`RewardError` where two rewards have one name."""
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise RewardError(
            f"two rewards are named {repeated[0]!r}", hint="give one of them another name: --reward NAME:=SPEC"
        )


def require_token_rewards(name: str, rewards: Sequence[float], completion: Completion, which: str) -> None:
    """Raise :class:`RewardError` unless ``rewards`` has one entry per token, 0 where the policy did not emit it.

    ``which`` names the completion in the error.
    """
    if len(rewards) != len(completion.ids):
        raise RewardError(
            f"reward {name!r} returned {len(rewards)} token rewards for {which}, which has {len(completion.ids)} tokens"
        )
    for i, (reward, emitted) in enumerate(zip(rewards, completion.mask, strict=True)):
        if reward and not emitted:
            raise RewardError(
                f"reward {name!r} returned {reward:g} for token {i} of {which}, which the policy did not emit",
                hint="token rewards must be 0 there",
            )
