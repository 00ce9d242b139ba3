"""Monitors watch every step: their alarms are written and shown, their state is resumed, and they can stop a run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commandline import numbers, read_rows, tether, workspace
from helpers import group, scored
from runs import SAMPLED
from tether.monitor.flat_rewards import FlatRewards
from tether.observers import Alarm
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.training import grpo
from tether.types import StepResult

TASK = f"{SAMPLED} --prompts-per-step 2 --max-new-tokens 5"
LINE = f"grpo {TASK} --group-size 2 --steps 7 --save-every 2 --quiet"
FLAT = "def fn(completions, **_):\n    return [1.0] * len(completions)\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "flat.py").write_text(FLAT)
    return tmp_path


def result(*totals: list[float]) -> StepResult:
    """A step whose groups have these rewards."""
    groups = [scored(group([0, 5 + i], [[6, 1]] * len(row)), row) for i, row in enumerate(totals)]
    return StepResult(metrics={}, groups=tuple(groups))


def alarms_of(monitor, results):
    """The steps that raise an alarm."""
    return [step for step, one in enumerate(results, 1) for _ in monitor.watch(step, one)]


def test_the_fifth_flat_step_in_a_row_raises_one_alarm():
    flat, told = result([1.0, 1.0], [0.0, 0.0]), result([1.0, 1.0], [0.0, 1.0])
    assert alarms_of(FlatRewards(), [flat] * 9) == [5]
    assert alarms_of(FlatRewards(), [result([0.1 + 0.2, 0.3])] * 5) == [5]  # equal but for rounding
    assert alarms_of(FlatRewards(), [flat, flat, told, *[flat] * 5, told, *[flat] * 5]) == [8, 14]
    monitor = FlatRewards()
    (alarm,) = [alarm for step in (3, 4, 5, 6, 7) for alarm in monitor.watch(step, flat)]
    assert alarm.monitor == "flat_rewards"
    assert "in steps 3 to 7 all completions of each prompt had equal rewards" in alarm.message
    assert not alarm.stop


def test_groups_of_one_completion_have_nothing_to_compare():
    assert alarms_of(FlatRewards(), [result([1.0], [1.0])] * 9) == []
    assert alarms_of(FlatRewards(), [result([1.0], [1.0, 1.0])] * 9) == [5]
    assert alarms_of(FlatRewards(), [StepResult(metrics={})] * 9) == []


@pytest.mark.parametrize(("command", "alarmed"), [("grpo --group-size 2", 1), ("ppo --group-size 2", 0)])
def test_grpo_watches_for_flat_rewards(command, alarmed, here, tiny, capfd):
    task = TASK.replace("r.py", "flat.py")
    assert tether(f"{command} {task} --steps 6 --quiet --model {tiny} --out out") == 0
    said = capfd.readouterr().err.splitlines()
    name = command.split()[0]
    assert [line.startswith(f"{name} step 5: flat_rewards: in steps 1 to 5") for line in said] == [True] * alarmed
    rows = read_rows(here / "out" / "alarms.jsonl") if alarmed else []
    assert [(row["step"], row["monitor"], row["stop"]) for row in rows] == [(5, "flat_rewards", False)] * alarmed
    assert (here / "out" / "alarms.jsonl").exists() == bool(alarmed)


def test_the_last_line_says_what_was_found(here, tiny, capfd):
    line = f"grpo --group-size 2 {TASK} --steps 6 --model {tiny}"
    assert tether(f"{line} --out told") == 0
    assert "alarm" not in capfd.readouterr().err
    assert tether(f"{line.replace('r.py', 'flat.py')} --out flat") == 0
    assert capfd.readouterr().err.rstrip().endswith("; 1 alarm, flat_rewards: tether audit flat")


def test_an_interrupted_run_raises_the_alarm_at_the_same_step(here, tiny):
    line = f"{LINE} --model {tiny}".replace("r.py", "flat.py")
    assert tether(f"{line} --out whole") == 0
    calls = []

    def stopping(*_):
        calls.append(1)
        if len(calls) in (4, 10):
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(stopping)
    try:
        assert tether(f"{line} --out cut") == 75  # before the alarm
        assert tether("resume cut") in (0, 75)  # perhaps after it
        assert tether("resume cut") == 0
    finally:
        hook.remove()
    assert len(read_rows(here / "cut" / "alarms.jsonl")) == 1
    assert numbers(here / "cut") == numbers(here / "whole")


def test_an_alarm_that_a_killed_run_has_written_is_not_written_twice(here, tiny, monkeypatch):
    """The rows after the last checkpoint are cut back on resuming, alarms included."""
    line = f"{LINE} --save-every 4 --model {tiny}".replace("r.py", "flat.py")
    record = Recorder.record

    def killed(self, step, result, *, last=False):
        record(self, step, result, last=last)
        if step == 6:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", killed)
        with pytest.raises(RuntimeError, match="killed"):
            tether(f"{line} --out cut")
    assert len(read_rows(here / "cut" / "alarms.jsonl")) == 1
    assert tether("resume cut") == 0
    assert [row["step"] for row in read_rows(here / "cut" / "alarms.jsonl")] == [5]


@dataclass
class Seen:
    steps: list[int] = field(default_factory=list)
    best: float | None = None


@dataclass
class Stopper:
    """A monitor of a user: it stops the run at one step."""

    at: int
    name: str = "stopper"
    state: Seen = field(default_factory=Seen)

    def watch(self, step, result):
        self.state.steps.append(step)
        self.state.best = max(self.state.best or 0.0, result.metrics["reward"])
        return [Alarm(monitor=self.name, message="enough of this", stop=True)] if step == self.at else []


def test_an_alarm_can_stop_a_run_which_resumes_with_the_monitor_state(here, tiny, capfd, monkeypatch):
    monitor = Stopper(at=3)
    train = grpo.train
    monkeypatch.setattr(grpo, "train", lambda command, start=grpo.NEW: train(command, start, monitors=[monitor]))
    assert tether(f"{LINE} --save-every 10 --model {tiny} --out out") == 3
    *told, last = capfd.readouterr().err.splitlines()
    assert told == ["grpo step 3: stopper: enough of this"]
    assert last == "tether grpo: grpo step 3: enough of this; resume with 'tether resume out'"
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2, 3]
    (row,) = read_rows(here / "out" / "alarms.jsonl")
    assert row.items() >= {"step": 3, "monitor": "stopper", "message": "enough of this", "stop": True}.items()
    assert [path.name for path in (here / "out" / "checkpoints").iterdir()] == ["step_000003"]
    assert not (here / "out" / "model").exists()
    before, monitor = monitor.state, Stopper(at=0)
    assert tether("resume out") == 0
    assert monitor.state.steps == [1, 2, 3, 4, 5, 6, 7]
    assert monitor.state.best >= before.best
    monitor = Stopper(at=0)
    assert tether(f"{LINE} --save-every 10 --model {tiny} --out whole") == 0
    (here / "out" / "alarms.jsonl").unlink()
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert [(one["step"], one["monitor"]) for one in summary["alarms"]] == [(3, "stopper")]
    (here / "out" / "summary.json").write_text(json.dumps(summary | {"alarms": []}))
    assert numbers(here / "out") == numbers(here / "whole")


def test_a_monitor_that_the_checkpoint_does_not_know_starts_afresh(here, tiny, monkeypatch):
    train, monitors = grpo.train, [Stopper(at=3)]
    monkeypatch.setattr(grpo, "train", lambda command, start=grpo.NEW: train(command, start, monitors=monitors))
    assert tether(f"{LINE} --model {tiny} --out out") == 3
    monitors.append(Stopper(at=0, name="another"))
    monitors[0].at = 0
    assert tether("resume out") == 0
    assert [monitor.state.steps for monitor in monitors] == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]


def test_monitors_need_names_that_differ():
    with pytest.raises(ValueError, match="flat_rewards, flat_rewards"):
        RunState(None, (FlatRewards(), FlatRewards()))
