"""Weighted sums of rewards, by hand."""

import math
from dataclasses import dataclass

import pytest

from helpers import group
from tether.algorithms.rollouts import rollout_figures
from tether.errors import RewardError
from tether.figures import reduce
from tether.rewards.combine import Judgement, WeightedSum
from tether.rewards.function import FunctionReward
from tether.world import ALONE


def reward(name, *values) -> FunctionReward:
    return FunctionReward(name, lambda completions: list(values))


GROUPS = [group([0, 5], [[6, 7, 1], [8, 1]], text="a question")]


def scores(*weighted):
    (scored,) = WeightedSum(weighted).score(GROUPS)
    assert scored.rollouts is GROUPS[0]
    return scored.scores


def test_a_sum_and_its_parts():
    first, second = scores((reward("a", 1.0, -2.0), 1.0), (reward("b", 10.0, 0.5), 0.1), (reward("c", 3.0, 3.0), -1.0))
    assert first.total == pytest.approx(1.0 + 1.0 - 3.0)
    assert second.total == pytest.approx(-2.0 + 0.05 - 3.0)
    assert first.parts == {"a": 1.0, "b": 10.0, "c": 3.0}  # before their weights
    assert first.token_rewards is second.token_rewards is None


def test_a_part_that_does_not_apply_is_left_out():
    first, second = scores((reward("a", None, 2.0), 1.0), (reward("b", 0.5, None), 2.0))
    assert (first.total, first.parts) == (1.0, {"a": None, "b": 0.5})
    assert (second.total, second.parts) == (2.0, {"a": 2.0, "b": None})


def test_rewards_per_token_add_up_token_by_token():
    first, second = scores(
        (reward("dense", [1.0, 2.0, 3.0], None), 2.0),
        (reward("denser", [0.5, 0.0, -0.5], [1.0, 1.0]), 1.0),
        (reward("last", 10.0, 4.0), 0.5),
    )
    assert first.token_rewards == (2.5, 4.0, 5.5 + 5.0)
    assert first.parts == {"dense": 6.0, "denser": 0.0, "last": 10.0}
    assert second.token_rewards == (1.0, 1.0 + 2.0)
    for score in (first, second):
        assert score.total == pytest.approx(sum(score.token_rewards))


@pytest.mark.parametrize(
    "weighted",
    [
        [(reward("a", 1e308, 1.0), 1.0), (reward("b", 1e308, 1.0), 1.0)],
        [(reward("a", 1e308, 1.0), 10.0)],
        [(reward("a", [1e308, 0.0, 1e308], 1.0), 1.0)],
        [(reward("a", [1e308, -1e308, 0.0], 1.0), 10.0)],
    ],
)
def test_finite_rewards_whose_sum_is_not_are_refused(weighted):
    with pytest.raises(RewardError, match="'a question' add up to more than a float can hold"):
        scores(*weighted)


def test_a_weight_of_zero_reports_and_does_not_count():
    assert scores((reward("a", 1.0, 1.0), 1.0), (reward("b", 9.0, 9.0), 0.0))[0].total == 1.0


def test_one_reward_of_many_groups_is_called_once():
    calls = []

    def count(completions):
        calls.append(len(completions))
        return [math.pi] * len(completions)

    found = WeightedSum(((FunctionReward("count", count), 1.0),)).score(GROUPS * 3)
    assert calls == [6]
    assert [len(scored.scores) for scored in found] == [2, 2, 2]


def test_nothing_that_applies_is_no_score():
    first, second = scores((reward("a", 1.0, None), 1.0), (reward("b", [1.0, 0.0, 0.0], None), 1.0))
    assert first.total == 2.0
    assert (second.total, second.token_rewards, second.parts) == (None, None, {"a": None, "b": None})


def test_names_tell_parts_apart():
    with pytest.raises(
        RewardError, match="two rewards are named 'a'; give one of them another name: --reward NAME:=SPEC"
    ):
        WeightedSum(((reward("a"), 1.0), (reward("b"), 1.0), (reward("a"), 2.0)))
    with pytest.raises(RewardError, match="no reward given; add --reward"):
        WeightedSum(())


# -- tokens that the policy did not emit ----------------------------------------------------------------------------


TURNS = [group([0, 5], [[6, 7, 8, 9], [6, 7, 8, 1]], masks=[[True, True, False, False], [True, False, False, True]])]
"""The first completion ends with two tokens of an environment."""


def test_a_number_goes_to_the_last_token_that_the_policy_emitted():
    dense = reward("dense", [1.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0])
    (scored,) = WeightedSum(((dense, 1.0), (reward("last", 10.0, 10.0), 0.5))).score(TURNS)
    assert [score.token_rewards for score in scored.scores] == [(1.0, 7.0, 0.0, 0.0), (1.0, 0.0, 0.0, 7.0)]
    assert [score.total for score in scored.scores] == [8.0, 8.0]


@dataclass(frozen=True)
class Dense:
    """A reward that is not a function: the same token rewards for every completion."""

    values: tuple[float, ...]
    name: str = "dense"

    def judge(self, groups):
        return [[Judgement(self.values) for _ in g.completions] for g in groups]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (1.0, 2.0, 0.5, 0.0),
            "reward 'dense' returned 0.5 for token 2 of a completion of the prompt 'p', which the policy did not emit; "
            "token rewards must be 0 there",
        ),
        (
            (1.0, 2.0),
            "reward 'dense' returned 2 token rewards for a completion of the prompt 'p', which has 4 tokens",
        ),
    ],
)
def test_token_rewards_that_do_not_fit_the_tokens(values, message):
    with pytest.raises(RewardError) as caught:
        WeightedSum(((Dense(values), 1.0),)).score(TURNS)
    assert str(caught.value) == message


# -- a reward of several members ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble:
    """The smaller of what two members say; it does not apply where the first does not."""

    first: tuple[float | None, ...]
    second: tuple[float, ...]
    name: str = "ensemble"

    def judge(self, groups):
        members = iter(zip(self.first, self.second, strict=True))
        return [[self.one(*next(members)) for _ in g.completions] for g in groups]

    @staticmethod
    def one(a, b) -> Judgement:
        return Judgement(None) if a is None else Judgement(min(a, b), parts={"first": a, "second": b})


def test_the_members_of_a_reward_are_parts_and_metrics():
    scorer = WeightedSum(((Ensemble((1.0, 4.0), (3.0, 2.0)), 2.0), (reward("a", 0.5, 0.5), 1.0)))
    (scored,) = scorer.score(GROUPS)
    assert [dict(score.parts) for score in scored.scores] == [
        {"ensemble": 1.0, "ensemble/first": 1.0, "ensemble/second": 3.0, "a": 0.5},
        {"ensemble": 2.0, "ensemble/first": 4.0, "ensemble/second": 2.0, "a": 0.5},
    ]
    assert [score.total for score in scored.scores] == [2.5, 4.5]  # members have no weight
    metrics = reduce(rollout_figures([scored]), ALONE)
    means = {name: metrics[name] for name in metrics if name.startswith("rewards/") and name.endswith("/mean")}
    assert means == {
        "rewards/a/mean": 0.5,
        "rewards/ensemble/mean": 1.5,
        "rewards/ensemble/first/mean": 2.5,
        "rewards/ensemble/second/mean": 2.5,
    }


def test_members_are_none_where_the_reward_does_not_apply():
    scorer = WeightedSum(((Ensemble((None, 4.0), (3.0, 2.0)), 1.0), (reward("a", 0.5, 0.5), 1.0)))
    (scored,) = scorer.score(GROUPS)
    assert scored.scores[0].parts == {"ensemble": None, "ensemble/first": None, "ensemble/second": None, "a": 0.5}
    assert reduce(rollout_figures([scored]), ALONE)["rewards/ensemble/first/mean"] == 4.0


@dataclass
class Odd:
    """A reward that gives what it is told to."""

    rows: list
    name: str = "odd"

    def judge(self, groups):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[Judgement(1.0)]], r"gave judgements for \[1\] completions per group, not \[2\]"),
        ([[Judgement(1.0)] * 3], r"for \[3\] completions"),
        ([], r"for \[\] completions"),
        ([[Judgement(1.0, parts={"a": math.nan})] * 2], "member 'a' of reward 'odd' gave nan, no finite number"),
        ([[Judgement(1.0, parts={"a/b": 1.0})] * 2], "member named 'a/b'"),
        ([[Judgement(math.nan)] * 2], "gave the value nan; a value is a finite number"),
        ([[Judgement([0.0, 1.0])] * 2], r"gave the value \[0.0, 1.0\]"),
        ([[Judgement("x")] * 2], "gave the value 'x'"),
        ([[1.0, 2.0]], "gave 1.0, which is no Judgement"),
    ],
)
def test_judgements_that_cannot_be_used_are_refused(rows, message):
    with pytest.raises(RewardError, match=message):
        WeightedSum(((Odd(rows), 1.0),)).score(GROUPS)
