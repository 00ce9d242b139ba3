"""What reward functions are told of the run and log, as in TRL: in the row, in the rollouts, and after a resume."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from commandline import assert_resumes, read_rows, tether, workspace
from helpers import group
from runs import LINES
from tether.algorithms.rollouts import rollout_figures
from tether.errors import RewardError
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.rewards.logged import Logged, set_progress

MODULE = """
def fn(completions, trainer_state, log_metric, log_extra, **columns):
    assert "trainer_state" not in columns
    log_metric("step", trainer_state.global_step)
    log_metric("steps", trainer_state.max_steps)
    log_extra("letters", [len(completion) for completion in completions])
    log_extra("said", completions)
    return [float(len(completion) % 5) + trainer_state.global_step for completion in completions]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "r.py").write_text(MODULE)
    yield tmp_path
    set_progress(0, 0)


@pytest.mark.parametrize("name", ["grpo", "ppo", "rejection-sampling"])
def test_a_module_of_trl_runs_unchanged(name, here, tiny):
    assert tether(f"{LINES[name]} --quiet --model {tiny} --out out") == 0
    rows = read_rows(here / "out" / "metrics.jsonl")
    assert [row["logged/step"] for row in rows] == list(range(len(rows)))
    assert {row["logged/steps"] for row in rows} == {len(rows)}
    table = pq.read_table(here / "out" / "rollouts" / "step_000001.parquet").to_pylist()
    assert [row["extra/letters"] for row in table] == [str(len(row["completion"])) for row in table]
    assert [row["extra/said"] for row in table] == [row["completion"] for row in table]


def test_what_was_logged_is_part_of_what_is_resumed(tiny):
    assert_resumes(f"{LINES['grpo']} --quiet --model {tiny}")


def two_groups():
    return [group([3], [[5, 1], [6, 1]]) for _ in range(2)]


def test_numbers_by_hand():
    def first(completions, log_metric, log_extra):
        log_metric("share", 1)
        log_metric("share", torch.tensor(2.0))
        log_extra("kind", [{"n": i} for i, _ in enumerate(completions)])
        return [0.0] * len(completions)

    def second(completions, **more):
        more["log_metric"]("other", np.float32(0.5))
        return [1.0] * len(completions)

    scored = WeightedSum(((FunctionReward("first", first), 1.0), (FunctionReward("second", second), 1.0))).score(
        two_groups()
    )
    assert [dict(score.logged) for score in scored[1].scores] == [{"share": 1.5, "other": 0.5}] * 2
    assert [json.loads(score.extra["kind"]) for score in scored[1].scores] == [{"n": 2}, {"n": 3}]
    assert rollout_figures(scored)["logged/share"].value == 1.5


def test_outside_of_a_run():
    seen = []

    def fn(completions, trainer_state):
        seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        return [0.0] * len(completions)

    reward = FunctionReward("fn", fn)
    reward.judge(two_groups())
    set_progress(3, 12)
    reward.judge(two_groups())
    assert seen == [(0, 0, None), (3, 12, 0.25)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda one: one.log_metric("x", float("nan")), "reward 'r' logged nan as 'x', no finite number"),
        (lambda one: one.log_metric("x", "much"), "reward 'r' logged 'much' as 'x', no finite number"),
        (lambda one: one.log_extra("x", [1]), "reward 'r' logged 1 values of 'x' for 2 completions"),
    ],
)
def test_what_cannot_be_logged(call, says):
    with pytest.raises(RewardError) as caught:
        call(Logged("r", 2))
    assert says in str(caught.value)


def test_a_call_that_failed_leaves_nothing():
    calls = []

    def fn(completions, log_metric):
        calls.append(1)
        log_metric("x", len(calls))
        if len(calls) == 1:
            raise ValueError("no")
        return [0.0] * len(completions)

    (found, _), _ = FunctionReward("fn", fn, retries=1).judge(two_groups())
    assert found.logged == {"x": 2.0}


def test_the_functions_parameters_of_these_names_are_no_columns():
    def fn(completions, trainer_state, log_metric, log_extra, answer):
        return []

    assert FunctionReward("fn", partial(fn)).needs == {"answer"}
