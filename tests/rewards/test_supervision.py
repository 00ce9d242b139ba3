"""Rewards that fail: past their deadline, in the middle of a request to stop, again and again, or once too often."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time

import pytest

from helpers import group
from tether.errors import ConfigError, RewardError
from tether.rewards.function import FunctionReward
from tether.rewards.resolve import resolve_scorer
from tether.rewards.supervision import supervised
from tether.stop_requests import DeadlineError, Interrupted, heeded

GROUPS = [group([0, 5], [[6, 1], [7, 8, 1]])]
FINE = [[1.0, 2.0]]
LONG = 20.0
"""What a function hangs for, in seconds; no test waits for it."""


def values(function, **kwargs):
    return [[judgement.value for judgement in row] for row in FunctionReward("mine", function, **kwargs).judge(GROUPS)]


@pytest.fixture(autouse=True)
def in_short():
    """Whatever is ended is ended soon."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < LONG / 4


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, recorded and not made."""
    made: list[float] = []
    monkeypatch.setattr("tether.rewards.supervision.pause", made.append)
    return made


def failing(*outcomes):
    """A function that raises or returns one of ``outcomes`` after the other, and the count of its calls."""
    calls = []

    def reward(completion_ids):
        calls.append(completion_ids)
        outcome = outcomes[len(calls) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return reward, calls


# -- deadlines ------------------------------------------------------------------------------------------------------


def sleeps(completions):
    time.sleep(LONG)
    return [1, 2]


def loops(completions):
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        pass
    return [1, 2]


def catches_errors(completions):
    try:
        time.sleep(LONG)
    except Exception:
        return [0, 0]
    return [1, 2]


def catches_everything(completions):
    with contextlib.suppress(BaseException):
        time.sleep(LONG)
    return [0, 0]


def fails_at_the_end(completions):
    try:
        time.sleep(LONG)
    except BaseException:
        raise ValueError("cut off") from None


def waits_for_a_lock(completions):
    threading.Event().wait(LONG)


def yields_late(completions):
    yield 1
    time.sleep(LONG)


async def awaits(completions):
    await asyncio.sleep(LONG)


async def sleeps_within_a_coroutine(completions):
    time.sleep(0.5)  # the thread still runs


HANGING = [
    sleeps, loops, catches_errors, catches_everything, waits_for_a_lock, yields_late, awaits, sleeps_within_a_coroutine
]  # fmt: skip


@pytest.mark.parametrize("function", HANGING)
def test_past_the_deadline(function):
    with pytest.raises(
        RewardError, match=r"^reward 'mine' did not return within 0.1 s; raise --reward-deadline or make it faster$"
    ):
        values(function, deadline=0.1)


def test_an_error_made_of_the_deadline():
    with pytest.raises(RewardError, match="'mine' raised ValueError: cut off"):
        values(fails_at_the_end, deadline=0.1)


def test_a_deadline_that_is_kept():
    assert values(lambda completions: [1, 2], deadline=LONG) == FINE
    assert values(lambda completions: time.sleep(0.05) or [1, 2], deadline=LONG) == FINE


def test_each_try_has_the_whole_deadline(pauses):
    calls = []

    def reward(completions):
        calls.append(None)
        time.sleep(LONG if len(calls) < 3 else 0)
        return [1, 2]

    assert values(reward, deadline=0.1, retries=2) == FINE
    assert len(calls) == 3


def test_what_hangs_in_a_coroutine_is_cancelled():
    ended = threading.Event()

    async def reward(completions):
        try:
            await asyncio.sleep(LONG)
        finally:
            ended.set()

    with pytest.raises(RewardError, match="did not return within"):
        values(reward, deadline=0.05)
    assert ended.wait(LONG / 4)


def test_a_thread_that_hangs_does_not_keep_the_process():
    let_go = threading.Event()

    async def reward(completions):
        let_go.wait(LONG)

    try:
        with pytest.raises(RewardError, match="did not return within"):
            values(reward, deadline=0.05)
        left = [thread for thread in threading.enumerate() if thread.name == "tether-async-calls"]
        assert left
        assert all(thread.daemon for thread in left)
    finally:
        let_go.set()


def test_functions_run_in_the_main_thread():
    assert values(lambda completions: [threading.current_thread() is threading.main_thread()] * 2, deadline=LONG) == [
        [1.0, 1.0]
    ]


def test_a_deadline_elsewhere_is_refused():
    errors = []

    def body():
        try:
            values(lambda completions: [1, 2], deadline=LONG, retries=3)
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert errors == ["a deadline works in the main thread only; call from there, or set none"]


# -- retries --------------------------------------------------------------------------------------------------------


def test_a_function_that_fails_twice_and_then_works(pauses, capsys):
    reward, calls = failing(OSError("down"), ValueError("two\nlines"), [1, 2])
    assert values(reward, retries=2) == FINE
    assert calls == [[[6, 1], [7, 8, 1]]] * 3
    assert pauses == [1.0, 2.0]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("tether: reward 'mine' raised OSError: down (test_supervision.py:")
    assert first.endswith("); try 2 of 3 in 1 s")
    assert second.startswith("tether: reward 'mine' raised ValueError: two lines (")
    assert second.endswith("); try 3 of 3 in 2 s")


def test_the_last_error_says_how_often(pauses):
    reward, calls = failing(*[OSError(f"down {i}") for i in range(1, 9)])
    with pytest.raises(RewardError, match=r"^reward 'mine' raised OSError: down 8 \(.*\); tried 8 times$"):
        values(reward, retries=7)
    assert len(calls) == 8
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


BAD = {
    "None": (None, "must return a list of values; it returned NoneType"),
    "nan": ([1, float("nan")], "returned nan for completion 1"),
    "too few": ([1], "returned 1 values for 2 completions"),
    "text": ([1, "2"], "returned '2' for completion 1"),
    "exit": (SystemExit(0), r"raised SystemExit: 0 \("),
    "cancelled": (asyncio.CancelledError(), "raised CancelledError"),
}


@pytest.mark.parametrize(("outcome", "message"), BAD.values(), ids=BAD)
def test_what_counts_as_a_failure(outcome, message, pauses):
    reward, calls = failing(outcome)
    with pytest.raises(RewardError, match=f"^reward 'mine' {message}") as caught:
        values(reward)
    assert "tried" not in str(caught.value)
    assert len(calls) == 1
    reward, calls = failing(outcome, outcome, [1, 2])
    assert values(reward, retries=2) == FINE
    assert len(calls) == 3
    with pytest.raises(RewardError, match=f"^reward 'mine' {message}.*; tried 2 times$"):
        values(failing(outcome, outcome)[0], retries=1)


def test_a_generator_that_raises():
    def reward(completions):
        yield 1
        raise TypeError("in the middle")

    with pytest.raises(RewardError, match=r"'mine' raised TypeError: in the middle \(test_supervision.py:"):
        values(reward)


def test_an_async_function_is_called_again(pauses):
    calls = []

    async def reward(completions):
        await asyncio.sleep(0)
        calls.append(None)
        return [1, 2] if len(calls) == 2 else None

    assert values(reward, retries=1) == FINE


def test_a_try_gets_lists_of_its_own(pauses):
    seen = []

    def reward(completion_ids):
        seen.append(completion_ids.pop())
        return [1, 2] if len(seen) == 2 else []

    assert values(reward, retries=1) == FINE
    assert seen == [[7, 8, 1], [7, 8, 1]]


@pytest.mark.parametrize("error", [ConfigError("wrong"), Interrupted("SIGTERM"), KeyboardInterrupt(), ValueError("x")])
def test_only_a_failed_reward_is_tried_again(error, pauses):
    calls = []

    def call():
        calls.append(None)
        raise error

    with pytest.raises(type(error)):
        supervised("mine", call, deadline=None, retries=3)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [Interrupted("SIGTERM"), DeadlineError(), KeyboardInterrupt()])
def test_a_function_reward_lets_pass_what_is_no_failure(error):
    expected = RewardError if isinstance(error, DeadlineError) else type(error)
    with pytest.raises(expected):
        values(failing(error)[0], deadline=LONG)


# -- requests to stop -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asked_to_stop():
    """SIGTERM comes a moment after the block begins, and is heeded there."""
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
    with heeded():
        timer.start()
        try:
            yield
        finally:
            timer.join()


@pytest.mark.parametrize("function", [*HANGING, fails_at_the_end])
def test_a_request_to_stop_is_no_failure(function, pauses):
    with pytest.raises(Interrupted, match="SIGTERM"), asked_to_stop():
        values(function, deadline=LONG, retries=3)
    assert pauses == []


def test_a_request_to_stop_between_two_tries(monkeypatch):
    monkeypatch.setattr("tether.rewards.supervision.FIRST_PAUSE", LONG)
    reward, calls = failing(OSError("down"), [1, 2])
    with pytest.raises(Interrupted, match="SIGTERM"), asked_to_stop():
        values(reward, retries=1)
    assert len(calls) == 1


def test_a_request_to_stop_needs_no_deadline():
    with pytest.raises(Interrupted, match="SIGTERM"), asked_to_stop():
        values(sleeps)


# -- from the options -----------------------------------------------------------------------------------------------


def test_deadline_and_retries_are_for_functions(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text("def seven(completions):\n    return [7.0 for _ in completions]\n")
    scorer = resolve_scorer(["length:4", f"{tmp_path}/mine.py:seven"], tokenizer, deadline=9.0, retries=2)
    (length, _), (seven, _) = scorer.rewards
    assert (length.deadline, length.retries) == (None, 0)
    assert (seven.deadline, seven.retries) == (9.0, 2)
    assert [score.total for score in scorer.score(GROUPS)[0].scores] == pytest.approx([6.5, 6.75])


def test_a_file_that_ends_the_process(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(RewardError, match=r"importing it raised SystemExit: 0 \(script.py:2\)"):
        resolve_scorer([f"{tmp_path}/script.py:seven"], tokenizer)
