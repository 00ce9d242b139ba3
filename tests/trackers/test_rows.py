"""What trackers are given: spread over a step, at most so much, and without secrets."""

from __future__ import annotations

import pytest
from torch import nn

from tether.observers import Alarm, StepRecord
from tether.trackers.rows import SAMPLES, TABLES, numbers, row_of, samples_every, without_secrets
from tether.types import Completion, FinishReason, Prompt, RolloutGroup, Score, ScoredGroup


def record(prompts: int, group_size: int) -> StepRecord:
    def completion(i: int, j: int) -> Completion:
        return Completion(
            ids=(5,),
            mask=(True,),
            sampler_logp=(-1.0,),
            finish_reason=FinishReason.EOS,
            text=f"{i}.{j}",
            weights_version=0,
        )

    groups = tuple(
        ScoredGroup(
            rollouts=RolloutGroup(
                prompt=Prompt(ids=(0,), text=f"p{i}"), completions=tuple(completion(i, j) for j in range(group_size))
            ),
            scores=tuple(Score(total=float(j), parts={"a": 1.0} if i else {"b": None}) for j in range(group_size)),
        )
        for i in range(prompts)
    )
    alarm = Alarm(monitor="flat", message="two\nlines \x1b[31m")
    return StepRecord(
        command="grpo",
        step=3,
        total=9,
        metrics={"step": 3.0, "reward": 1.0},
        groups=groups,
        alarms=(alarm,),
        model=nn.Identity(),
    )


def test_a_table_is_spread_over_the_prompts():
    row = row_of(record(16, 2), samples=True)
    assert [sample["prompt"] for sample in row.samples] == [f"p{i}" for i in range(0, 16, 2)]
    assert len(row.samples) == SAMPLES
    assert row.metrics == {"reward": 1.0}


def test_a_small_step_is_shown_whole_and_columns_are_alike():
    row = row_of(record(2, 2), samples=True)
    assert [sample["completion"] for sample in row.samples] == ["0.0", "0.1", "1.0", "1.1"]
    assert [(sample["rewards/a"], sample["rewards/b"]) for sample in row.samples] == [(None, None)] * 2 + [
        (1.0, None)
    ] * 2


def test_a_step_without_rollouts_has_no_table():
    assert row_of(record(0, 1), samples=True).samples == ()
    assert row_of(record(2, 1), samples=False).samples == ()


def test_alarms_are_lines():
    assert row_of(record(1, 1), samples=False).alarms == (("flat", "two lines \\u001b[31m"),)


@pytest.mark.parametrize("total", [1, 19, 20, 21, 100, 1001])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_tables_are_few_and_belong_to_rollout_files(total, every):
    between = samples_every(every, total)
    assert between % every == 0
    assert total // between <= TABLES
    if between > every:  # not fewer than needed
        assert total / (between - every) > TABLES


def test_without_rollout_files_there_are_no_tables():
    assert samples_every(0, 100) == 0


def test_numbers_of_a_summary():
    summary = {"a": 1, "b": {"c": 2.5, "d": {"e": None, "f": "text"}}, "g": True, "h": [1.0]}
    assert dict(numbers(summary, "final/")) == {"final/a": 1.0, "final/b/c": 2.5}


def test_options_lose_the_passwords_in_their_addresses():
    config = {"reward": ["J:=https://me:secret@host/score?key=secret"], "steps": 3, "model": "http://u:secret@h/m"}
    assert "secret" not in str(without_secrets(config))
    assert without_secrets(config)["steps"] == 3
