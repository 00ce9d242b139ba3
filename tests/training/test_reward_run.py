"""``tether reward`` from end to end: what it says of itself at the end, and what nothing may depend on."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commandline import numbers, read_rows, tether, write_rows
from tether import config
from tether.algorithms import reward_model
from tether.observers import Stop
from tether.runtime.judged_pairs import read_judged
from tether.training.reward import Reward, train

RUN = "reward --pairs pairs.jsonl --batch-size 8 --epochs 2"


def row(prompt, i, *, turned=False):
    sides = [f" yes {i}", f" no, not {i}"]
    return {
        "prompt": f"Question {prompt}",
        **dict(zip(("chosen", "rejected"), sides[:: -1 if turned else 1], strict=True)),
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [row(i, i) for i in range(60)])
    write_rows(tmp_path / "test.jsonl", [row(100 + i // 2, i, turned=i % 3 == 1) for i in range(20)])
    return tmp_path


def summary(path):
    return json.loads((path / "summary.json").read_text())


def test_the_last_line_and_the_summary_agree_with_the_test_pairs(here, tiny, capfd):
    assert tether(f"{RUN} --test-pairs test.jsonl --out out --model", tiny) == 0
    found, pairs = summary(here / "out"), read_judged(here / "out")
    assert (found["pairs"], found["stopping_pairs"], found["test_pairs"]) == (54, 6, 20)
    assert (found["judged_on"], found["judged_prompts"]) == ("test", 10)
    accuracy = sum(pair.margin > 0 for pair in pairs) / 20
    assert found["accuracy"] == pytest.approx(accuracy)
    low, high = found["accuracy_ci95"]
    assert low < accuracy < high
    assert all(pair.margin == pair.chosen_score - pair.rejected_score for pair in pairs)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in read_rows(here / "test.jsonl")
    ]
    assert [p.prompt_index for p in pairs] == [i // 2 for i in range(20)]
    assert [(p.chosen_length, p.rejected_length) for p in pairs][:2] == [(7, 11), (11, 7)]
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("held-out"))
    wide = 100 * max(accuracy - low, high - accuracy)
    assert line == (
        f"held-out {accuracy:.1%} ± {wide:.1f} on 20 pairs of 10 prompts (95% Wilson), "
        f"kept step {found['best_step']} of {found['steps']}, stopped: end of the run"
    )


def test_the_line_of_a_run_that_stopped_early_and_has_no_test_pairs(here, tiny, capfd):
    line = f"{RUN} --epochs 30 --evals-per-epoch 4 --patience 2 --learning-rate 1e-8 --test-share 0 --out out --model"
    assert tether(line, tiny) == 0
    found = summary(here / "out")
    assert (found["stopped"], found["test_pairs"], found["judged_on"]) == ("no better in 2", 0, "stopping")
    assert found["steps"] < 30 * 7
    assert found["accuracy"] == found["stopping_accuracy"]
    assert not (here / "out" / "test_pairs.parquet").exists()
    said = capfd.readouterr().err
    assert re.search(r"^accuracy .* on 6 pairs that it was chosen by \(95% Wilson\), .*: no better in 2$", said, re.M)


def test_quiet_says_nothing(tiny, capfd):
    assert tether(f"{RUN} --epochs 0.2 --quiet --out out --model", tiny) == 0
    assert capfd.readouterr().err == ""


def test_nothing_depends_on_the_test_pairs(here, tiny):
    write_rows(here / "other.jsonl", [{"prompt": "Z", "chosen": "no", "rejected": "yes"}])
    for name in ("test", "other"):
        assert tether(f"{RUN} --test-pairs {name}.jsonl --quiet --out {name} --model", tiny) == 0
    one, other = (numbers(here / name) for name in ("test", "other"))
    assert one["model.safetensors"] == other["model.safetensors"]
    assert one["metrics.jsonl"] == other["metrics.jsonl"]
    judgement = {key for key in one["summary"] if one["summary"][key] != other["summary"][key]}
    assert {"test_pairs", "accuracy_ci95"} <= judgement
    assert not judgement & {"best_step", "steps", "score_mean", "score_std", "stopping_accuracy", "stopping_log_loss"}


def test_an_interrupted_run_has_the_test_pairs_of_an_uninterrupted_one(here, tiny):
    assert tether(f"{RUN} --quiet --out whole --model", tiny) == 0
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(stop)
    assert tether(f"{RUN} --quiet --out cut --model", tiny) == 75
    hook.remove()
    assert tether("resume cut --quiet") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    files = [(here / name / "test_pairs.parquet").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_eval_prints_what_the_run_found(here, tiny, capsys):
    assert tether(f"{RUN} --test-pairs test.jsonl --quiet --out out --model", tiny) == 0
    capsys.readouterr()
    assert tether("eval --reward-model out/model --pairs test.jsonl") == 0
    printed, found = json.loads(capsys.readouterr().out), summary(here / "out")
    assert [printed["accuracy_low"], printed["accuracy_high"]] == pytest.approx(found["accuracy_ci95"])
    for name in ("accuracy", "log_loss", "calibration_error", "longer_wins", "prefers_longer"):
        assert printed[name] == pytest.approx(found[name], abs=1e-5)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_hook_ends_the_run_between_evaluations(step, here, tiny):
    """The weights that it ends with are evaluated, kept if they are the best, saved and judged."""
    seen = []

    def end(record):
        seen.append(record.step)
        return Stop(reason="enough") if record.step == step else None

    options = reward_model.Config(batch_size=8, epochs=2, evals_per_epoch=3)
    run = config.RunOptions(out="out", quiet=True)
    train(Reward(model=tiny, pairs="pairs.jsonl", run=run, reward=options), hooks=[end])
    found = summary(here / "out")
    assert seen == list(range(1, step + 1))
    assert (found["steps"], found["stopped"], found["ended"]) == (step, "enough", "enough")
    assert 1 <= found["best_step"] <= step
    assert (here / "out" / "model" / "model.safetensors").is_file()


def test_dropped_rows_are_counted_by_kind(here, tiny):
    rows = [row(i, i) for i in range(40)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["prompt"] = "long" * 40
    write_rows(here / "pairs.jsonl", rows)
    line = f"{RUN} --epochs 0.2 --on-bad-rows skip --overlong drop --quiet --out out --model"
    assert tether(line, tiny) == 0
    assert summary(here / "out")["dropped_rows"] == {"equal sides": 1, "over-long: dropped": 1}


@pytest.mark.parametrize("value", ["1", "-0.1"])
def test_a_share_that_is_none(value, tiny, capfd):
    assert tether(f"{RUN} --test-share {value} --out out --model", tiny) == 2
    assert "test_share must be 0 or more and less than 1" in capfd.readouterr().err


def test_keep_best_chooses_by_another_figure(here, tiny):
    line = f"{RUN} --evals-per-epoch 3 --keep-best=-eval/margin --save-every 1 --quiet --out out --model"
    assert tether(line, tiny) == 0
    rows = [row for row in read_rows(here / "out" / "metrics.jsonl") if "eval/margin" in row]
    lowest = min(rows, key=lambda row: row["eval/margin"])
    found = summary(here / "out")
    assert found["best"] == {"step": lowest["step"], "value": lowest["eval/margin"], "path": "model"}
    assert found["best_step"] == lowest["step"] != max(row["step"] for row in rows)
    assert found["stopping_accuracy"] == lowest["eval/accuracy"]
    assert found["stopping_log_loss"] == pytest.approx(lowest["eval/loss"])


def test_pairs_are_given_in_python(here, tiny):
    import tether as library

    rows = read_rows(here / "pairs.jsonl")
    judged = read_rows(here / "test.jsonl")
    run = library.reward_model.run(model=tiny, pairs=rows, test_pairs=judged, out="p", quiet=True)
    found = summary(here / "p")
    assert run.summary["accuracy"] == found["accuracy"]
    assert (found["pairs"], found["stopping_pairs"], found["test_pairs"]) == (54, 6, 20)
