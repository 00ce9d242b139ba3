"""Evaluations during training: what they report, that nothing depends on them, and that they resume exactly."""

from __future__ import annotations

import json
import os
import signal

import pyarrow.parquet
import pytest

from commandline import numbers, read_rows, tether, workspace, write_rows
from helpers import group, scored
from runs import SAMPLED
from tether.data.records import load_prompts
from tether.evaluation import policy_kl
from tether.generation.engine import Engine
from tether.models.loading import context_length, load_policy
from tether.models.reference import FrozenCopy
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.seeds import derive_seed
from tether.training import held_out
from tether.training.held_out import Judged, by_part
from tether.types import Sampling, make_requests

TASK = f"{SAMPLED} --group-size 2 --max-new-tokens 5 --learning-rate 1e-2 --quiet --seed 3"
LINES = {
    "grpo": f"grpo {TASK} --prompts-per-step 2 --steps 5",
    "ppo": f"ppo {TASK} --prompts-per-step 2 --steps 5",
    "rejection-sampling": f"rejection-sampling {TASK} --rounds 5 --batch-size 4 --epochs 1",
}
HELD_OUT = "--eval-prompts held_prompts.jsonl"
EVALUATED = f"{HELD_OUT} --eval-every 2 --eval-group-size 3 --eval-reward judge.py:judge"
JUDGE = "def judge(completions, **_):\n    return [float(c.count('e')) - len(c) / 7 for c in completions]\n"
COUNTED = "    with open('calls', 'a') as calls:\n        calls.write('x')\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def rows_of(run):
    return read_rows(run / "metrics.jsonl")


def evaluated(row):
    return {name: value for name, value in row.items() if name.startswith("eval/")}


@pytest.mark.parametrize("name", LINES)
def test_evaluations_change_nothing_but_their_own_metrics(name, here, tiny):
    assert tether(f"{LINES[name]} --model {tiny} --out without") == 0
    assert tether(f"{LINES[name]} {EVALUATED} --model {tiny} --out with") == 0
    without, found = numbers(here / "without"), numbers(here / "with")
    own = [evaluated(row) for row in found["metrics.jsonl"]]
    assert [bool(one) for one in own] == [False, True, False, True, True]  # the last step is evaluated too
    for row in found["metrics.jsonl"]:
        for metric in evaluated(row):
            del row[metric]
    found.pop("summary"), without.pop("summary")
    assert found == without
    if name != "rejection-sampling":  # which measures a KL of its own there
        assert ["time/eval" in row for row in rows_of(here / "with")] == [False, True, False, True, True]


def sampled(path, tokenizer, model, *, seed, size, limit):
    """What ``model`` writes on the prompts of a file: one list of completions per prompt."""
    prompts = load_prompts(str(path), tokenizer, context=context_length(model), max_new_tokens=limit)
    asked = make_requests(prompts, group_size=size, seed=seed)
    return Engine(model, tokenizer).generate(asked, sampling=Sampling(max_new_tokens=limit))


def test_the_figures_are_those_of_a_loop_over_what_the_saved_model_writes(here, tiny):
    assert tether(f"{LINES['grpo']} {EVALUATED} --model {tiny} --out out") == 0
    (base, tokenizer), (policy, _) = load_policy(tiny), load_policy(str(here / "out" / "model"))
    given = {"seed": derive_seed(3, "evaluation"), "size": 3, "limit": 5}
    theirs, ours = (sampled(here / "held_prompts.jsonl", tokenizer, model, **given) for model in (base, policy))

    def reward(completion):
        return float(len(completion.text) % 5)

    def judge(completion):
        return completion.text.count("e") - len(completion.text) / 7

    def wins(score):
        pairs = [
            (score(a), score(b))
            for mine, other in zip(ours, theirs, strict=True)
            for a, b in zip(mine.completions, other.completions, strict=True)
        ]
        return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)

    written = [one for group in ours for one in group.completions]
    row = evaluated(rows_of(here / "out")[-1])
    assert row["eval/reward"] == pytest.approx(sum(map(reward, written)) / 9)
    assert row["eval/rewards/fn"] == row["eval/reward"]
    assert row["eval/rewards/judge"] == pytest.approx(sum(map(judge, written)) / 9)
    assert row["eval/win_rate"] == pytest.approx(wins(reward))
    assert row["eval/win_rates/judge"] == pytest.approx(wins(judge))
    assert row["eval/mean_length"] == pytest.approx(sum(len(one.ids) for one in written) / 9)
    totals = WeightedSum(((FunctionReward("fn", lambda completions, **_: [0.0] * len(completions)), 1.0),)).score(ours)
    kl = policy_kl(totals, policy=policy, reference=FrozenCopy(base), temperature=1.0)
    assert row["eval/kl"] == pytest.approx(kl, rel=1e-4)
    assert kl > 0.01


def test_the_end_has_the_figures_of_the_last_evaluation_and_every_completion(here, tiny):
    assert tether(f"{LINES['grpo']} {EVALUATED} --model {tiny} --out out") == 0
    row = evaluated(rows_of(here / "out")[-1])
    summary = json.loads((here / "out" / "summary.json").read_text())
    policy, judged = summary["evaluation"]["policy"], summary["eval_rewards"]["judge"]
    for name in ("reward", "reward_ci95", "win_rate", "kl", "mean_length"):
        assert policy[name] == row[f"eval/{name}"]
    assert policy["rewards"] == {"fn": row["eval/rewards/fn"], "judge": row["eval/rewards/judge"]}
    assert policy["completions"] == 9
    assert judged["policy"]["reward"] == row["eval/rewards/judge"]
    assert judged["policy"]["reward_ci95"] == row["eval/rewards_ci95/judge"]
    assert judged["policy"]["win_rate"] == row["eval/win_rates/judge"]
    assert judged["reference"]["win_rate"] == 0.5
    table = pyarrow.parquet.read_table(here / "out" / "evaluation.parquet").to_pylist()
    mine = [one for one in table if one["model"] == "policy"]
    assert len(table) == 2 * len(mine) == 18
    assert sum(one["score"] for one in mine) / 9 == pytest.approx(policy["reward"])
    assert sum(one["rewards/judge"] for one in mine) / 9 == pytest.approx(row["eval/rewards/judge"])
    assert sum(one["kl"] for one in mine) / 9 == pytest.approx(row["eval/kl"])


def test_a_run_without_evaluations_is_compared_at_its_end_with_the_same_numbers(here, tiny):
    assert tether(f"{LINES['grpo']} {EVALUATED} --model {tiny} --out often") == 0
    once = EVALUATED.replace("--eval-every 2", "")
    assert tether(f"{LINES['grpo']} {once} --model {tiny} --out once") == 0
    often, at_end = (json.loads((here / name / "summary.json").read_text()) for name in ("often", "once"))
    assert often["evaluation"] == at_end["evaluation"]
    assert often["eval_rewards"] == at_end["eval_rewards"]
    assert not any(evaluated(row) for row in rows_of(here / "once"))
    assert (here / "often/evaluation.parquet").read_bytes() == (here / "once/evaluation.parquet").read_bytes()


@pytest.fixture
def stopped_at(monkeypatch):
    """A request to stop during the n-th evaluation, after its completions are scored."""

    def at(n, number=signal.SIGTERM):
        calls, measure = [], held_out.completion_kl

        def stopping(*given, **rest):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return measure(*given, **rest)

        monkeypatch.setattr(held_out, "completion_kl", stopping)

    return at


@pytest.mark.parametrize("name", LINES)
def test_a_stop_in_an_evaluation_resumes_with_its_scores(name, here, tiny, stopped_at, capfd):
    (here / "judge.py").write_text(JUDGE.replace("**_):\n", f"**_):\n{COUNTED}"))
    line = f"{LINES[name]} {EVALUATED} --save-every 0 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    paid = (here / "calls").read_text()
    assert paid == "x" * 4  # the reference once, and three evaluations, of which the last one is the end's
    (here / "calls").unlink()
    stopped_at(2)
    assert tether(f"{line} --out cut") == 75
    assert "stopped by SIGTERM in step 4" in capfd.readouterr().err
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    assert (here / "cut/evaluation.parquet").read_bytes() == (here / "whole/evaluation.parquet").read_bytes()
    assert (here / "calls").read_text() == paid


def test_a_stop_in_the_comparison_at_the_end_resumes_with_its_scores(here, tiny, stopped_at, capfd):
    (here / "judge.py").write_text(JUDGE.replace("**_):\n", f"**_):\n{COUNTED}"))
    line = f"{LINES['grpo']} {EVALUATED} --keep-best=-eval/kl --save-every 0 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    paid = (here / "calls").read_text()
    (here / "calls").unlink()
    stopped_at(4)  # of the best step's model, after three evaluations
    assert tether(f"{line} --out cut") == 75
    assert "stopped by SIGTERM after its last step" in capfd.readouterr().err
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    assert (here / "calls").read_text() == paid


def test_an_evaluation_reward_that_fails_stops_the_run_which_resumes(here, tiny, capfd):
    line = f"{LINES['grpo']} {EVALUATED} --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    failing = "calls = []\n" + JUDGE.replace(
        "**_):\n", "**_):\n    calls.append(1)\n    if len(calls) == 3:\n        raise ValueError('no answer')\n"
    )
    (here / "judge.py").write_text(failing)
    assert tether(f"{line} --out cut") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("tether grpo: grpo step 4: evaluation: reward 'judge' raised ValueError: no answer")
    assert "resume" in said
    (here / "judge.py").write_text(JUDGE)
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


def test_another_evaluation_reward_may_judge_from_here_on(here, tiny, stopped_at):
    """What the first one said of the reference and of the step's completions is not taken for the second one's."""
    (here / "other.py").write_text("def judge(completions, **_):\n    return [1000.0 for c in completions]\n")
    stopped_at(2)
    assert tether(f"{LINES['grpo']} {EVALUATED} --model {tiny} --out out") == 75
    assert tether("resume out --eval-reward other.py:judge") == 2
    assert tether("resume out --eval-reward other.py:judge --allow") == 0
    judged = [row["eval/rewards/judge"] for row in rows_of(here / "out") if "eval/reward" in row]
    assert judged[0] < 1000
    assert judged[1:] == [1000.0, 1000.0]
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert summary["evaluation"]["reference"]["rewards"]["judge"] == 1000.0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("--eval-every 2", "eval_every needs eval_prompts"),
        ("--eval-reward length:3", "eval_reward needs eval_prompts"),
        (f"{HELD_OUT} --eval-every -1", "eval_every must be 0 or more"),
        (f"{HELD_OUT} --eval-group-size 0", "eval_group_size must be at least 1"),
        (f"{HELD_OUT} --eval-reward length:3=2", "the evaluation reward 'length' has the weight 2"),
        (f"{HELD_OUT} --eval-reward r.py:fn", "two rewards are named 'fn'"),
        (f"{HELD_OUT} --eval-reward judge.py:nothing", "nothing"),
        (f"{HELD_OUT} --eval-reward !:=judge.py:judge", "--eval-reward !:=judge.py:judge: the name '!'"),
        (f"{HELD_OUT} --patience 2", "patience watches eval/reward, which the run does not measure"),
        (f"{HELD_OUT} --keep-best eval/kl", "keep_best watches eval/kl, which the run does not measure"),
        ("--stop-kl 0", "stop_kl must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(more, complaint, here, tiny, capfd):
    assert tether(f"{LINES['grpo']} {more} --model {tiny} --out out") == 2
    assert complaint in capfd.readouterr().err.splitlines()[-1]
    assert not (here / "out").exists()


def test_a_column_that_the_judge_needs_is_looked_for_in_the_held_out_prompts_alone(here, tiny, capfd):
    (here / "judge.py").write_text("def judge(completions, gold, **_):\n    return [float(one) for one in gold]\n")
    line = f"{LINES['grpo']} {EVALUATED} --model {tiny} --out out"
    assert tether(line) == 2
    assert "reward 'judge' needs the column 'gold'" in capfd.readouterr().err
    write_rows(here / "held_prompts.jsonl", [{"prompt": f"Sentence {i} is", "gold": float(i)} for i in range(3)])
    assert tether(line) == 0
    assert rows_of(here / "out")[1]["eval/rewards/judge"] == 1.0


def test_parts_of_a_judge_stand_beside_the_total_of_the_rewards():
    groups = [group([0, 5], [[6, 1], [7, 1]])]
    trained = WeightedSum(((FunctionReward("a", lambda completions, **_: [1.0, 2.0]), 3.0),))
    judge = WeightedSum(((FunctionReward("b", lambda completions, **_: [None, 5.0]), 1.0),))
    (found,) = Judged(trained, judge).score([one.rollouts for one in (scored(g, [0, 0]) for g in groups)])
    assert [(one.total, dict(one.parts)) for one in found.scores] == [
        (3.0, {"a": 1.0, "b": None}),
        (6.0, {"a": 2.0, "b": 5.0}),
    ]
    assert [one.total for one in by_part([found], "b")[0].scores] == [None, 5.0]


def test_a_judge_that_applies_to_nothing_is_named(here, tiny, capfd):
    (here / "judge.py").write_text("def judge(completions, **_):\n    return [None for c in completions]\n")
    assert tether(f"{LINES['grpo']} {EVALUATED} --model {tiny} --out out") == 2
    assert "evaluation: reward 'judge': no reward applies" in capfd.readouterr().err.splitlines()[-1]
