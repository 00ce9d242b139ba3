"""Rewards that are asked about groups while others are still sampled: the same scores, in few calls."""

from __future__ import annotations

import asyncio
import threading

import pytest

from commandline import numbers, tether, workspace
from helpers import completion
from tether.errors import RewardError
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.types import Prompt, RolloutGroup


def groups(count):
    return [
        RolloutGroup(
            prompt=Prompt(ids=(1,), text=f"p{i}"),
            completions=tuple(completion([5] * (i + k + 1), text="x" * (i + k + 1)) for k in range(2)),
        )
        for i in range(count)
    ]


def lengths(calls, gate=None):
    async def reward(completions):
        calls.append(len(completions))
        if gate is not None:
            await asyncio.to_thread(gate.wait, 20)
        return [float(len(text)) for text in completions]

    return FunctionReward("lengths", reward)


def totals(scored):
    return [[score.total for score in group.scores] for group in scored]


def test_the_scores_are_those_of_one_call_at_the_end():
    calls, sampled = [], groups(5)
    computed = FunctionReward("two", lambda completions: [2.0] * len(completions))
    scorer = WeightedSum(((lengths(calls), 1.0), (computed, 0.5)))
    plain = totals(scorer.score(sampled))
    assert calls == [10]
    ahead = scorer.asking_ahead()
    for group in reversed(sampled):  # groups finish in any order
        ahead.begin(group)
    assert totals(ahead.score(sampled)) == plain == [[i + 2.0, i + 3.0] for i in range(5)]
    assert sum(calls) == 20


def test_one_call_at_a_time_with_all_that_has_finished_meanwhile():
    calls, gate, sampled = [], threading.Event(), groups(4)
    scorer = WeightedSum(((lengths(calls, gate), 1.0),)).asking_ahead()
    for group in sampled[:3]:
        scorer.begin(group)
    assert len(scorer.ahead[0].waiting) == 2  # behind the call that is under way
    gate.set()
    assert totals(scorer.score(sampled)) == [[i + 1.0, i + 2.0] for i in range(4)]
    assert calls == [2, 6]


def test_a_call_begins_before_the_last_group_is_sampled():
    asked = threading.Event()

    async def reward(completions):
        asked.set()
        return [1.0] * len(completions)

    first, last = groups(2)
    scorer = WeightedSum(((FunctionReward("r", reward), 1.0),)).asking_ahead()
    scorer.begin(first)
    assert asked.wait(20)
    assert totals(scorer.score([first, last])) == [[1.0, 1.0], [1.0, 1.0]]


def test_groups_of_an_earlier_attempt_are_forgotten():
    calls = []
    scorer = WeightedSum(((lengths(calls), 1.0),)).asking_ahead()
    scorer.begin(groups(1)[0])
    again = groups(2)  # equal, and others
    assert totals(scorer.score(again)) == [[1.0, 2.0], [2.0, 3.0]]
    assert not scorer.ahead[0].known


def test_a_failure_is_an_error_and_leaves_nothing_under_way():
    async def fails(completions):
        raise OSError("down")

    sampled = groups(2)
    scorer = WeightedSum(((FunctionReward("fails", fails), 1.0),)).asking_ahead()
    scorer.begin(sampled[0])
    with pytest.raises(RewardError, match="'fails' raised OSError: down"):
        scorer.score(sampled)
    assert scorer.ahead[0].call is None
    assert not scorer.ahead[0].waiting


def test_where_another_reward_fails_the_calls_are_given_up():
    began, ended = threading.Event(), threading.Event()

    async def hangs(completions):
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    computed = FunctionReward("computes", lambda completions: 1 / 0)
    scorer = WeightedSum(((FunctionReward("hangs", hangs), 1.0), (computed, 1.0))).asking_ahead()
    (group,) = groups(1)
    scorer.begin(group)
    assert began.wait(20)
    with pytest.raises(RewardError, match="'computes' raised ZeroDivisionError"):
        scorer.score([group])
    assert ended.wait(20)


@pytest.mark.parametrize("name", ["grpo", "rejection-sampling"])
def test_a_run_is_the_same(name, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "waits.py").write_text(
        "import asyncio\n"
        "async def fn(completions, **_):\n"
        "    await asyncio.sleep(0.001)\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )
    size = "--steps 2 --prompts-per-step 3" if name == "grpo" else "--rounds 1 --batch-size 2"
    line = (
        f"{name} --model {tiny} --prompts p.jsonl --reward waits.py:fn --group-size 2 --max-new-tokens 5 {size} --quiet"
    )
    assert tether(f"{line} --out plain") == 0
    assert tether(f"{line} --overlap-scoring --out ahead") == 0
    assert numbers(tmp_path / "ahead") == numbers(tmp_path / "plain")
