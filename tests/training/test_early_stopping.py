"""Runs that end early: by their KL, by a metric that does not improve, and by a hook; and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from commandline import contents, numbers, read_rows, tether, workspace
from runs import SAMPLED
from tether.algorithms import grpo as algorithm
from tether.config import EvaluationOptions, PromptOptions, RunOptions, Steps
from tether.monitor.early_stopping import EarlyStopping
from tether.observers import Stop
from tether.runtime.recorder import Recorder
from tether.training import grpo
from tether.training.policy import early_stopping
from tether.types import Sampling, StepResult

TASK = f"{SAMPLED} --group-size 2 --max-new-tokens 5 --learning-rate 1e-2 --quiet"
GRPO = f"grpo {TASK} --prompts-per-step 2 --steps 9"
LINES = {
    "grpo": GRPO,
    "ppo": f"ppo {TASK} --prompts-per-step 2 --steps 9",
    "rejection-sampling": f"rejection-sampling {TASK} --rounds 9 --batch-size 4 --epochs 1",
}
EVALUATED = "--eval-prompts held_prompts.jsonl --eval-every 1"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "flat.py").write_text("def fn(completions, **_):\n    return [1.0] * len(completions)\n")
    return tmp_path


def watcher(**limits) -> EarlyStopping:
    return EarlyStopping(**{"stop_kl": None, "kl": "kl", "window": 1, "patience": 0, "metric": "m"} | limits)


def reasons(monitor, values, metric="m"):
    """What ends the run, by step; a value of None is a row without the metric."""
    found = {}
    for step, value in enumerate(values, 1):
        metrics = {} if value is None else {metric: value}
        for stop in monitor.watch(step, StepResult(metrics=metrics)):
            found[step] = stop.reason
    return found


def test_patience_counts_values_that_are_not_better_than_the_best():
    told = reasons(watcher(patience=2), [1.0, 3.0, 2.0, None, 3.0, 5.0])
    assert told == {5: "m no better in 2 steps than 3 at step 2"}
    assert reasons(watcher(patience=2), [1.0, 0.0, 2.0, 1.0, 3.0]) == {}
    told = reasons(watcher(patience=1, metric="eval/m"), [1.0, 1.0], "eval/m")  # an equal value is no better
    assert told == {2: "eval/m no better in 1 evaluation than 1 at step 1"}
    assert list(reasons(watcher(patience=2, metric="-m"), [3.0, 4.0, 2.0, 2.5, 2.5])) == [5]
    assert reasons(watcher(patience=0), [3.0, 2.0, 1.0, 0.0]) == {}


def test_the_kl_is_averaged_over_the_window():
    assert list(reasons(watcher(stop_kl=2.0, window=3), [9.0, 0.0, -4.0, 9.0, 2.0], "kl")) == [
        5
    ]  # (-4 + 9 + 2) / 3 > 2
    assert list(reasons(watcher(stop_kl=2.0, window=3), [9.0, 9.0], "kl")) == []
    told = reasons(watcher(stop_kl=2.0, kl="eval/kl"), [None, 2.0, None, 2.5], "eval/kl")
    assert told == {4: "eval/kl is 2.5 nats per completion, above 2"}
    assert reasons(watcher(stop_kl=None), [1e9], "kl") == {}


def test_what_is_watched_follows_from_the_options():
    run = RunOptions(out="o")
    alone = early_stopping(run, EvaluationOptions(stop_kl=1.0))
    assert (alone.kl, alone.window, alone.metric, alone.patience) == ("kl", 3, "eval/reward", 0)
    evaluated = early_stopping(
        RunOptions(out="o", keep_best="-eval/kl"), EvaluationOptions(eval_prompts="p", eval_every=5, patience=4)
    )
    assert (evaluated.kl, evaluated.window, evaluated.metric, evaluated.patience) == ("eval/kl", 1, "-eval/kl", 4)


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("name", LINES)
def test_a_run_without_improvement_ends_as_if_done(name, here, tiny, capfd):
    line = LINES[name].replace("r.py", "flat.py").replace(" --quiet", "")
    assert tether(f"{line} {EVALUATED} --patience 2 --model {tiny} --out out") == 0
    why = "eval/reward no better in 2 evaluations than 1 at step 1"
    assert summary(here / "out")["ended"] == why
    assert f": out; ended after step 3 of 9: {why}; held out: " in capfd.readouterr().err.splitlines()[-1]
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2, 3]
    assert (here / "out" / "model" / "model.safetensors").is_file()
    assert summary(here / "out")["evaluation"]["policy"]["reward"] == 1.0
    assert not (here / "out" / "alarms.jsonl").exists()
    assert tether("resume out") == 0
    assert "finished" in capfd.readouterr().err.splitlines()[-1]


def test_a_run_ends_by_the_kl_of_its_samples_or_of_its_evaluations(here, tiny):
    assert tether(f"{GRPO} --model {tiny} --out whole") == 0
    kl = [row["kl"] for row in read_rows(here / "whole" / "metrics.jsonl")]
    means = [sum(kl[i - 3 : i]) / 3 for i in range(3, 10)]
    limit = max(means[:3]) + 1e-6
    over = next(i for i, mean in enumerate(means, 3) if mean > limit)
    assert tether(f"{GRPO} --stop-kl {limit} --model {tiny} --out out") == 0
    assert len(read_rows(here / "out" / "metrics.jsonl")) == over
    assert "kl of the last 3 steps is" in summary(here / "out")["ended"]
    assert tether(f"{GRPO} {EVALUATED} --model {tiny} --out evaluated") == 0
    kl = [row["eval/kl"] for row in read_rows(here / "evaluated" / "metrics.jsonl")]
    over = next(i for i, value in enumerate(kl, 1) if value > kl[1])
    assert tether(f"{GRPO} {EVALUATED} --stop-kl {kl[1]} --model {tiny} --out stopped") == 0
    assert len(read_rows(here / "stopped" / "metrics.jsonl")) == over
    assert summary(here / "stopped")["ended"].startswith("eval/kl is ")


@pytest.fixture
def struck(monkeypatch):
    """End the process's work, as a kill would, at the moment that a method of the recorder is called."""

    class Killed(BaseException):
        pass

    def at(method):
        def strike(*_, **__):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, method, strike)
            yield Killed

    return at


@pytest.mark.parametrize("method", ["take_best", "finish"])
def test_a_run_that_is_killed_between_the_stop_and_its_end_trains_no_more(method, here, tiny, struck):
    line = f"{GRPO.replace('r.py', 'flat.py')} {EVALUATED} --patience 2 --save-every 0 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    for killed in struck(method):
        with pytest.raises(killed):
            tether(f"{line} --out cut")
    assert not (here / "cut" / "summary.json").exists()
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    assert [row["step"] for row in read_rows(here / "cut" / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_is_stopped_before_its_end_counts_on_where_it_was(here, tiny, monkeypatch):
    line = f"{GRPO.replace('r.py', 'flat.py')} {EVALUATED} --patience 3 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    record = Recorder.record

    def stopping(self, step, result, *, last=False):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, step, result, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", stopping)
        assert tether(f"{line} --out cut") == 75
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    assert summary(here / "cut")["steps"] == 4


def test_a_run_that_ended_early_continues_with_more_patience(here, tiny):
    line = f"{GRPO.replace('r.py', 'flat.py')} {EVALUATED} --patience 2 --keep-checkpoints --model {tiny}"
    assert tether(f"{line} --out out") == 0
    assert tether("resume out --patience 4") == 2
    assert tether("resume out --patience 4 --allow") == 0
    assert summary(here / "out")["steps"] == 5
    assert tether("resume out --patience 0 --allow") == 0
    assert summary(here / "out")["steps"] == 9
    assert summary(here / "out")["ended"] is None


def test_hooks_see_every_row_and_may_end_the_run(here, tiny):
    seen = []

    def watch(record):
        seen.append((record.command, record.step, record.total, len(record.groups), record.metrics["reward"]))
        return Stop(reason="enough") if record.step == 2 else None

    command = grpo.GRPO(
        model=str(tiny),
        task=PromptOptions(prompts="p.jsonl", reward=("r.py:fn",)),
        run=RunOptions(out="out", quiet=True),
        length=Steps(steps=4, prompts_per_step=2),
        grpo=algorithm.Config(group_size=2, sampling=Sampling(max_new_tokens=4)),
    )
    grpo.train(command, hooks=[watch])
    rows = read_rows(here / "out" / "metrics.jsonl")
    assert seen == [("grpo", step, 4, 2, rows[step - 1]["reward"]) for step in (1, 2)]
    assert summary(Path("out"))["ended"] == "enough"
    assert "model/model.safetensors" in contents(here / "out")
