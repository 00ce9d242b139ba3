"""Weighted sums of rewards, by hand."""

import math

import pytest

from helpers import group
from tether.errors import RewardError
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward


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


def test_rewards_a_token_add_up_token_by_token():
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


def test_nothing_that_applies():
    with pytest.raises(RewardError, match="no reward applies to a completion of the prompt 'a question'"):
        scores((reward("a", 1.0, None), 1.0), (reward("b", 1.0, None), 1.0))


def test_names_tell_parts_apart():
    with pytest.raises(RewardError, match="two rewards are named 'a'"):
        WeightedSum(((reward("a"), 1.0), (reward("b"), 1.0), (reward("a"), 2.0)))
    with pytest.raises(RewardError, match="no reward given; add --reward"):
        WeightedSum(())
