"""Problems of reasoning-gym: rows, scores, and the tasks whose scorers would run what a model writes."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from commandline import tether
from tether.environments.generated import made
from tether.errors import DataError, RewardError
from tether.rewards.reasoning import RUNS_ANSWERS, answer_in, reasoning_gym

gym = pytest.importorskip("reasoning_gym", reason="needs the extra 'reasoning'")


def test_rows_are_problems_with_their_answers_and_entries():
    rows = made("reasoning-gym:leg_counting,count=3,seed=5").values
    assert len(rows) == 3
    rule = reasoning_gym(None)
    cells = [row["entry"] for row in rows]
    assert rule([f"<answer>{row['answer']}</answer>" for row in rows], entry=cells) == [1.0] * 3
    assert rule(["#### " + row["answer"] for row in rows], entry=cells) == [1.0] * 3
    assert max(rule(["<answer>-1</answer>"] * 3, entry=cells)) < 1
    assert rows == made("reasoning-gym:leg_counting,seed=5,count=3").values


def test_an_answer_that_the_scorer_cannot_read_is_wrong():
    (row,) = made("reasoning-gym:prime_factorization,count=1").values
    assert reasoning_gym(None)(["x"], entry=[row["entry"]]) == [0.0]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("reasoning-gym:leg_count", DataError, "has no task 'leg_count'; did you mean leg_counting"),
        ("reasoning-gym", DataError, "has no task ''"),
        ("reasoning-gym:leg_counting,size=3", DataError, "no option 'size'"),
        ("reasoning-gym:countdown", RewardError, "runs what a model writes as code"),
        ("reasoning-gym:graph_color,count=2", DataError, "cannot be kept as rows"),
    ],
)
def test_what_cannot_be_made_is_one_line(source, kind, message):
    with pytest.raises(kind, match=message):
        made(source)


def test_no_other_scorer_runs_what_it_is_given():
    """The library's own code, searched for what runs text."""
    runs = re.compile(r"\beval\(|\bexec\(|\.parse_expr\(|import parse_expr|sympify")
    for name, (cls, _) in gym.factory.DATASETS.items():
        module = inspect.getsource(inspect.getmodule(cls))
        if name != "basic_arithmetic" and runs.search(module):  # which evaluates its own expressions as it makes them
            assert name in RUNS_ANSWERS, name


@pytest.mark.parametrize("cell", [None, "", "{}", "3", json.dumps({"metadata": {}})])
def test_a_row_of_something_else_is_an_error(cell):
    with pytest.raises(RewardError, match="is no problem of reasoning-gym"):
        reasoning_gym(None)(["x"], entry=[cell])


def test_a_row_cannot_name_a_task_that_runs_code():
    cell = json.dumps({"question": "", "answer": "1", "metadata": {"source_dataset": "countdown"}})
    with pytest.raises(RewardError, match="runs what a model writes"):
        reasoning_gym(None)(["__import__('os')"], entry=[cell])


def test_where_an_answer_stands():
    assert answer_in("<answer>1</answer> or <answer>\n2 </answer>") == "2"
    assert answer_in(r"so \boxed{3}") == "3"


def test_a_run(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    line = "grpo --prompts reasoning-gym:basic_arithmetic,count=4 --reward reasoning_gym --steps 1 --prompts-per-step 2"
    assert tether(f"{line} --group-size 2 --max-new-tokens 4 --model {tiny} --out out --quiet") == 0
