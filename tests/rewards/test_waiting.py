"""Rewards that wait for something elsewhere do so at the same time, each with its own deadline and tries."""

import asyncio
import functools
import os
import threading
import time

import pytest
import torch

from helpers import group
from tether.errors import RewardError
from tether.rewards import waiting
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward, is_async
from tether.rewards.process import Apart
from tether.rewards.waiting import Waiting, together

GROUPS = [group([0, 5], [[6, 1], [7, 8, 1]])]
LONG = 20.0


def scores(*rewards):
    (scored,) = WeightedSum(tuple((reward, 1.0) for reward in rewards)).score(GROUPS)
    return [score.total for score in scored.scores]


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("tether.rewards.waiting.FIRST_PAUSE", 0.01)


def meeting(count):
    """Async functions of which none returns before all of them are called."""
    there = []

    async def reward(completions, number):
        there.append(number)
        while len(there) < count:
            await asyncio.sleep(0.001)
        return [float(number)] * len(completions)

    return [
        FunctionReward(f"r{i}", functools.partial(reward, number=i), deadline=LONG / 4) for i in range(1, count + 1)
    ]


def test_async_functions_wait_at_the_same_time():
    assert scores(*meeting(4)) == [10.0, 10.0]


def test_what_is_async():
    class Client:
        async def __call__(self, completions):
            return [1.0] * len(completions)

        async def method(self, completions):
            return [2.0] * len(completions)

    async def plain(completions, weight):
        return [weight] * len(completions)

    asynchronous = [Client(), Client().method, functools.partial(functools.partial(plain), weight=4.0)]
    assert all(map(is_async, asynchronous))
    assert not any(map(is_async, [len, lambda completions: plain(completions, 1.0), Client]))
    assert scores(*[FunctionReward(str(i), one) for i, one in enumerate(asynchronous)]) == [7.0, 7.0]


def test_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(waiting, "AT_ONCE", 2)
    running, most = [], []

    async def reward(completions):
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.005)
        running.pop()
        return [1.0] * len(completions)

    assert scores(*[FunctionReward(f"r{i}", reward) for i in range(5)]) == [5.0, 5.0]
    assert max(most) == 2


def test_those_that_compute_come_first():
    """No server is asked about a step that another reward cannot score."""
    asked = []

    async def asks(completions):
        asked.append(1)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="'computes' raised ZeroDivisionError"):
        scores(FunctionReward("asks", asks), FunctionReward("computes", lambda completions: 1 / 0))
    assert not asked


def test_one_that_fails_ends_the_others():
    ended = threading.Event()

    async def hangs(completions):
        try:
            await asyncio.sleep(LONG)
        finally:
            ended.set()

    async def fails(completions):
        await asyncio.sleep(0.01)
        raise OSError("down")

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"^reward 'fails' raised OSError: down"):
        scores(FunctionReward("hangs", hangs), FunctionReward("fails", fails))
    assert ended.wait(LONG / 4)
    assert time.monotonic() - started < LONG / 4


def test_each_has_its_own_deadline():
    async def sleeps(completions):
        await asyncio.sleep(0.1)
        return [1.0] * len(completions)

    patient, hasty = FunctionReward("patient", sleeps, deadline=LONG), FunctionReward("hasty", sleeps, deadline=0.02)
    with pytest.raises(RewardError, match=r"^reward 'hasty' did not return within 0.02 s"):
        scores(patient, hasty)


def test_each_is_tried_again_on_its_own(no_pause, capsys):
    tries = {"a": 0, "b": 0}

    def failing(name, times):
        async def reward(completions):
            await asyncio.sleep(0)
            tries[name] += 1
            if tries[name] <= times:
                raise OSError("down")
            return [float(tries[name])] * len(completions)

        return FunctionReward(name, reward, retries=3)

    assert scores(failing("a", 1), failing("b", 3)) == [6.0, 6.0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert sum(line.startswith("tether: reward 'b' raised OSError: down") for line in said) == 3
    with pytest.raises(RewardError, match=r"OSError: down.*; tried 4 times$"):
        scores(failing("a", 100))


def test_what_they_set_for_the_process_is_undone(tmp_path):
    before = os.getcwd(), torch.get_default_dtype()

    async def moves(completions):
        os.chdir(tmp_path)
        return [1.0] * len(completions)

    async def doubles(completions):
        torch.set_default_dtype(torch.float64)
        return [torch.ones(1).double().item()] * len(completions)

    assert scores(FunctionReward("m", moves), FunctionReward("d", doubles)) == [2.0, 2.0]
    assert (os.getcwd(), torch.get_default_dtype()) == before


def test_functions_of_one_file_enter_its_settings_once(tmp_path):
    apart = Apart(own={"working directory": str(tmp_path)})

    async def where(completions):
        return [float(os.getcwd() == str(tmp_path))] * len(completions)

    assert scores(*[FunctionReward(f"r{i}", where, apart=apart) for i in range(2)]) == [2.0, 2.0]


def test_results_keep_their_order():
    def call(i):
        async def start():
            await asyncio.sleep(0.02 / (i + 1))
            return i

        return Waiting(name=str(i), start=start)

    assert together([call(i) for i in range(5)]) == list(range(5))
    assert together([]) == []
