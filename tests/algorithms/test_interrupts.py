"""A step that is interrupted: it resumes with its own prompts to the same bits, and with no others."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from dataclasses import replace

import pytest
import torch

from interrupting import CONFIGS, OTHERS, PROMPTS, Points, Setting, Watched, interrupt, load, reported, same
from tether.algorithms import rejection_sampling as rs
from tether.algorithms import sft
from tether.data.batching import Cursor
from tether.errors import ConfigError
from tether.runtime.state import RunState, Snapshot, restore
from tether.stop_requests import anywhere, at_safe_points, check, heeded
from tether.types import Demonstration


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny)


def pending(setting) -> bool:
    return setting.state.update is not None


def number(state) -> int:
    return state.round if isinstance(state, rs.State) else state.step


def taken(setting) -> bool:
    """Whether the weights have moved."""
    state = setting.state
    return (state.tuning.guard if isinstance(state, rs.State) else state.guard).taken > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_interrupted_anywhere_resumes_with_its_prompts_alone(name, loaded, monkeypatch):
    def fresh():
        return Setting(name, loaded, monkeypatch)

    def interrupted(at):
        setting = fresh()
        with pytest.raises(KeyboardInterrupt):
            setting.step(PROMPTS, Points(at, interrupt))
        return setting

    whole, other, points = fresh(), fresh(), Points()
    expected, expected_other = reported(whole.step(PROMPTS, points)), reported(other.step(OTHERS))
    assert {"generate", "scored", "load", "loaded", "evaluate", "evaluated"} <= set(points.passed)
    assert points.passed.count("check") > 10
    stages = set()
    for at, point in enumerate(points.passed, 1):
        setting = interrupted(at)
        assert number(setting.state) == 0
        stages.add((pending(setting), taken(setting)))
        if pending(setting):
            before = setting.held()
            with pytest.raises(ConfigError, match=r" 1: an update .* other prompts; .*state\.abandon\(\)"):
                setting.step(OTHERS)
            assert same(setting.held(), before)
            rolled = Points()
            assert reported(setting.step(PROMPTS, rolled)) == expected, (at, point)
            assert "score" not in rolled.passed  # nor is anything sampled for it
        else:
            assert reported(setting.step(PROMPTS)) == expected, (at, point)
        assert same(setting.held(), whole.held()), (at, point)
        if at % 3:
            continue
        setting = interrupted(at)
        moved = taken(setting)
        setting.state.abandon()
        found = setting.step(OTHERS)
        assert sorted(group.rollouts.prompt.text for group in found.groups) == [one.text for one in OTHERS]
        assert number(setting.state) == 1
        assert all(map(math.isfinite, found.metrics.values()))
        totals = [score.total for group in found.groups for score in group.scores if score.total is not None]
        assert found.metrics["reward"] == pytest.approx(sum(totals) / len(totals))
        if not moved:
            assert reported(found) == expected_other
            assert same(setting.held(), other.held())
    assert stages == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_after_an_interrupted_evaluation_no_weight_moves_again(name, loaded, monkeypatch):
    whole, points = Setting(name, loaded, monkeypatch), Points()
    expected = reported(whole.step(PROMPTS, points))
    assert points.passed[-2:] == ["evaluate", "evaluated"]
    setting = Setting(name, loaded, monkeypatch)
    for at in (len(points.passed) - 1, 4):  # in the second call the points before the evaluation are fewer
        with pytest.raises(KeyboardInterrupt):
            setting.step(PROMPTS, Points(at, interrupt))
        weights = [weight.clone() for weight in setting.state.policy.parameters()]
    assert reported(setting.step(PROMPTS)) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, setting.state.policy.parameters(), strict=True))


class Replaying(Watched):
    """A generator that gives what it gave before, as a journal does."""

    def __init__(self, inner, result):
        super().__init__(inner, Points())
        self.groups = {group.rollouts.prompt.ids: group.rollouts for group in result.groups}
        self.own = {name: result.metrics[name] for name in inner.figures()}

    def figures(self):
        return self.own

    def generate(self, requests, *, sampling):
        if len(requests[0].seeds) == 1:  # what rejection sampling measures its KL on
            return super().generate(requests, sampling=sampling)
        return [self.groups[request.prompt.ids] for request in requests]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_within_a_step_belongs_to_its_prompts_too(name, loaded, monkeypatch, tmp_path):
    whole, points = Setting(name, loaded, monkeypatch), Points()
    result = whole.step(PROMPTS, points)
    expected = reported(result)
    late = [at for at, point in enumerate(points.passed, 1) if point in ("load", "evaluate")]
    checks = [at for at, point in enumerate(points.passed, 1) if point == "check" and at < late[0]]
    for at in (checks[-1], *late):
        setting = Setting(name, loaded, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            setting.step(PROMPTS, Points(at, interrupt))
        directory = tmp_path / str(at)
        directory.mkdir()
        Snapshot.of(RunState(setting.state)).write(directory)
        restored = Setting(name, loaded, monkeypatch)
        restore(RunState(restored.state), directory)
        assert same(restored.held(), setting.held())
        before = restored.held()
        with pytest.raises(ConfigError, match="belongs to other prompts"):
            restored.step(OTHERS)
        changed = Replaying(restored.engine, result)
        first = changed.groups[PROMPTS[0].ids]
        changed.groups[PROMPTS[0].ids] = replace(first, completions=first.completions[::-1])
        with pytest.raises(ConfigError, match=r"gave other completions than .* state\.abandon\(\)"):
            restored.step(PROMPTS, generator=changed)
        assert same(restored.held(), before)
        assert reported(restored.step(PROMPTS, generator=Replaying(restored.engine, result))) == expected
        assert same(restored.held(), whole.held())


def test_the_prompts_that_dynamic_sampling_drew_are_not_given_to_the_next_step(loaded, monkeypatch):
    """An interrupted step puts its cursor back; resumed in memory, it samples nothing and has drawn as much."""
    monkeypatch.setitem(CONFIGS, "grpo", replace(CONFIGS["grpo"], dynamic_sampling=2))
    prompts = [replace(prompt, ids=(*prompt.ids, last)) for prompt in PROMPTS for last in range(80, 84)]

    def run(at: int) -> Setting:
        setting = Setting("grpo", loaded, monkeypatch)
        cursor = setting.state.cursor = Cursor(len(prompts), seed=0)
        points = [Points(at, interrupt), Points()] if at else [Points()]
        drawn.clear()

        def fresh(count):
            drawn.append(count)
            return cursor.take(prompts, count)

        for one in points:
            with contextlib.suppress(KeyboardInterrupt), cursor.rollback_on_error():
                setting.step(cursor.take(prompts, 2), one, fresh=fresh)
        assert number(setting.state) == 1
        return setting

    drawn: list[int] = []
    whole = run(0)
    assert drawn
    assert whole.state.cursor.position == 2 + sum(drawn)
    count = Points()
    Setting("grpo", loaded, monkeypatch).step(PROMPTS, count)
    for at in (len(count.passed), len(count.passed) - 3):
        assert run(at).state.cursor == whole.state.cursor


# -- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_waits_for_a_safe_point():
    reached = []

    @at_safe_points()
    def work():
        signal.raise_signal(signal.SIGINT)
        reached.append("past the signal")
        check()
        reached.append("past the check")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["past the signal"]
    assert signal.getsignal(signal.SIGINT) is handler
    check()  # it took effect once


def test_a_signal_takes_effect_at_the_end_of_the_outermost_block():
    reached = []

    @at_safe_points()
    def inner():
        signal.raise_signal(signal.SIGINT)

    @at_safe_points()
    def outer():
        inner()
        reached.append("past the inner block")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert reached == ["past the inner block"]


@pytest.mark.parametrize("before", [True, False])
def test_within_foreign_code_a_signal_takes_effect_at_once(before):
    reached = []

    @at_safe_points()
    def ours():
        signal.raise_signal(signal.SIGINT)
        reached.append("in ours")

    @at_safe_points()
    def work():
        if before:
            signal.raise_signal(signal.SIGINT)
        with anywhere():
            reached.append("in foreign code")
            ours()
            reached.append("past ours")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ([] if before else ["in foreign code", "in ours"])


def test_an_error_and_a_signal_that_waits_raise_both():
    @at_safe_points()
    def work():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("broken")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


def test_where_a_signal_is_a_request_to_stop_it_stays_one():
    with heeded():
        handler = signal.getsignal(signal.SIGINT)
        with at_safe_points():
            assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_have_no_signals_to_hold_back():
    found = []

    def work():
        with at_safe_points(), anywhere():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


# -- training on rows ------------------------------------------------------------------------------------------------

ROWS = [Demonstration(prompt_ids=(0, 70 + i), completion_ids=(100 + i, 1)) for i in range(4)]
TUNING = sft.Config(epochs=2, batch_size=2, micro_batch_tokens=1)


def tuned(loaded, monkeypatch, at=0):
    """The rows of all steps and the final state, where a step or an evaluation was interrupted at check ``at``."""
    setting = Setting("rejection-sampling", loaded, monkeypatch)
    state = setting.state = sft.State.create(setting.state.policy, len(ROWS), TUNING, seed=0)
    points = Points(at, interrupt)
    rows = []

    def run():
        rows.extend(result.metrics for result in sft.steps(state, ROWS, ROWS[:2], config=TUNING))

    with monkeypatch.context() as patch:
        patch.setattr("tether.stop_requests.check", lambda: points.reach("check"))
        try:
            run()
        except KeyboardInterrupt:
            if state.pending is not None:
                with pytest.raises(ConfigError, match=r"metrics are pending; resume with steps\(\), or drop"):
                    sft.step(state, ROWS[:1], config=TUNING)
            run()
    rows = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
    return rows, setting.held(), len(points.passed)


def test_fine_tuning_that_is_interrupted_gives_the_same_rows(loaded, monkeypatch):
    expected, held, count = tuned(loaded, monkeypatch)
    assert len(expected) == 4
    assert ["eval/loss" in row for row in expected] == [False, True, False, True]
    for at in range(1, count + 1):
        rows, found, _ = tuned(loaded, monkeypatch, at)
        assert rows == expected, at
        assert same(found, held)
