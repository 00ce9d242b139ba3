"""A run of DPO: what it refuses, what ends it, what it leaves behind, and what it can be compared with."""

from __future__ import annotations

import json

import pytest

from commandline import read_rows, tether, workspace, write_rows
from tether.report.comparison import compare
from tether.report.held_out import read_candidates
from tether.report.panels import shown_metrics
from tether.report.view import RunView

DPO = "dpo --pairs pairs.jsonl --batch-size 6 --out out"
HELD_OUT = "--eval-prompts held_prompts.jsonl --eval-group-size 2 --max-new-tokens 4"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def summary():
    with open("out/summary.json", encoding="utf-8") as file:
        return json.load(file)


# ----------------------------------------------------------------------------------------------------- what is refused


def pairs_of_one_prompt(directory):
    write_rows(directory / "pairs.jsonl", [{"prompt": "Q", "chosen": f" a{i}", "rejected": " b"} for i in range(4)])


def a_held_out_prompt(directory):
    write_rows(directory / "held_prompts.jsonl", [{"prompt": "Other"}, {"prompt": "Q1"}])


REFUSED = {
    "one prompt": (pairs_of_one_prompt, "", "pairs.jsonl: all pairs have one prompt"),
    "a held-out prompt": (
        a_held_out_prompt,
        f"{HELD_OUT} --eval-reward length:3",
        "pairs.jsonl:2: its prompt is held out (held_prompts.jsonl:2); leave it out with --on-bad-rows skip",
    ),
    "patience": (None, "--patience 2 --eval-share 0", "patience watches eval/loss, and there are no held-out pairs"),
    "stop_kl": (None, "--stop-kl 1", "stop_kl needs eval_every"),
    "prompts without a reward": (None, HELD_OUT, "eval_prompts needs eval_reward"),
    "a metric of no evaluation": (None, "--keep-best eval/kl", "the run has no metric 'eval/kl'"),
    "no held-out loss": (None, "--keep-best=-eval/loss --eval-share 0", "the run has no metric 'eval/loss'"),
    "a name of the pairs": (
        None,
        f"{HELD_OUT} --eval-reward margins:=length:3",
        "an evaluation reward is named 'margins'",
    ),
}


@pytest.mark.parametrize(("change", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_one_line_and_leaves_nothing(change, options, said, tiny, here, capsys):
    if change is not None:
        change(here)
    assert tether(f"{DPO} {options} --model {tiny}") == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert said in shown
    assert not (here / "out").exists()


def test_a_pair_with_a_held_out_prompt_can_be_left_out(tiny, here):
    a_held_out_prompt(here)
    assert tether(f"{DPO} {HELD_OUT} --eval-reward length:3 --on-bad-rows skip --quiet --model {tiny}") == 0
    assert summary()["dropped_rows"] == {"held out too": 1}
    assert summary()["pairs"] + summary()["held_out_pairs"] == 19


# -------------------------------------------------------------------------------------------------------- what ends it


@pytest.fixture
def opposite(here):
    """Held-out pairs that prefer what the training pairs reject: their loss rises from the first step."""
    rows = [{"prompt": f"R{i}", "chosen": f" no {i}", "rejected": f" yes {i}"} for i in range(6)]
    write_rows(here / "opposite.jsonl", rows)
    return "--eval-pairs opposite.jsonl --evals-per-epoch 4 --epochs 8 --learning-rate 1e-2 --quiet"


def test_patience_ends_the_run_by_the_loss_on_the_held_out_pairs(opposite, tiny):
    assert tether(f"{DPO} {opposite} --patience 2 --model {tiny}") == 0
    found = summary()
    assert found["ended"].startswith("eval/loss no better in 2 evaluations than")
    assert found["steps"] < 8 * 4


def test_keep_best_takes_the_weights_with_the_least_loss_on_the_held_out_pairs(opposite, tiny, here):
    assert tether(f"{DPO} {opposite} --keep-best=-eval/loss --model {tiny}") == 0
    rows = read_rows(here / "out" / "metrics.jsonl")
    losses = {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
    best = summary()["best"]
    assert best["value"] == min(losses.values())
    assert losses[best["step"]] == best["value"]
    assert best["step"] < max(losses)


def test_the_kl_on_held_out_prompts_ends_the_run(tiny):
    line = f"{DPO} {HELD_OUT} --eval-reward length:3 --eval-every 1 --epochs 8 --learning-rate 1e-2 --quiet"
    assert tether(f"{line} --stop-kl 0.01 --model {tiny}") == 0
    assert summary()["ended"].startswith("eval/kl is ")


# --------------------------------------------------------------------------------------------------- what it is like


def test_it_is_compared_by_what_its_samples_were_measured_by(tiny, here):
    """Two runs that differ in their evaluation reward have no figure in common; one that was trained on it has."""
    line = f"{HELD_OUT} --quiet --model {tiny}"
    assert tether(f"{DPO} {line} --out a --eval-reward length:3 r.py:fn") == 0
    assert tether(f"{DPO} {line} --out b --eval-reward r.py:fn") == 0
    grpo = "grpo --prompts p.jsonl --reward length:3 --steps 1 --prompts-per-step 2 --group-size 2 --out c"
    assert tether(f"{grpo} {line}") == 0
    a, b, c = read_candidates([here / name for name in "abc"])
    assert a.rewards["score"] == c.rewards["score"] == "1 * length:3"
    assert b.rewards["score"] != a.rewards["score"]
    assert a.trained_on == frozenset()
    assert [(pair.a, pair.b) for pair in compare([a, b], by="score").pairs] == []
    assert len(compare([a, b], by="fn").pairs) == len(compare([a, c], by="score").pairs) == 1
    found = compare([a])
    assert found.trained_on is False


def test_the_figures_of_pairs_are_not_shown_as_rewards_of_samples(tiny, here):
    line = f"{DPO} {HELD_OUT} --eval-every 1 --eval-reward length:3 --quiet --model {tiny}"
    assert tether(line) == 0
    shown = dict(shown_metrics([RunView.read(here / "out")]))
    assert shown["Each reward on held-out prompts"] == ["eval/rewards/length"]
    assert shown["Accuracy"] == ["rewards/accuracies", "eval/rewards/accuracies"]
    assert shown["Rewards that the policy implies"] == ["rewards/chosen", "rewards/rejected"]
