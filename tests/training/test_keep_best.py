"""``--keep-best``: the model of the best step is the result; and which checkpoints a run leaves behind."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from commandline import contents, numbers, read_rows, tether, workspace
from runs import SAMPLED
from tether.runtime import recorder as recording
from tether.runtime.recorder import Recorder

TASK = f"{SAMPLED} --group-size 2 --max-new-tokens 5 --learning-rate 1e-2 --quiet"
HELD_OUT = "--eval-prompts held_prompts.jsonl --eval-every 2"
LINES = {
    "grpo": f"grpo {TASK} --prompts-per-step 2 --steps 7 {HELD_OUT}",
    "ppo": f"ppo {TASK} --prompts-per-step 2 --steps 7 {HELD_OUT}",
    "rejection-sampling": f"rejection-sampling {TASK} --rounds 7 --batch-size 4 --epochs 1 {HELD_OUT}",
}
SFT = "sft --data texts.jsonl --eval-data held_texts.jsonl --batch-size 2 --epochs 3 --learning-rate 3e-2 --quiet"
GRPO = LINES["grpo"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def summary(run):
    return json.loads((run / "summary.json").read_text())


def weights(path):
    return load_file(path / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def best_of(rows, metric, sign):
    """Step and value of the best row, by a loop over the rows that have the metric."""
    found = None
    for row in rows:
        if metric in row and (found is None or sign * row[metric] > sign * found[1]):
            found = int(row["step"]), row[metric]
    return found


@pytest.mark.parametrize("name", LINES)
def test_the_model_is_that_of_the_best_evaluation(name, here, tiny, capfd):
    line = LINES[name].replace(" --quiet", "")
    assert tether(f"{line} --keep-best=-eval/kl --save-every 5 --keep-checkpoints --model {tiny} --out out") == 0
    step, value = best_of(read_rows(here / "out" / "metrics.jsonl"), "eval/kl", -1.0)
    assert step < 7
    assert summary(here / "out")["best"] == {"step": step, "value": value, "path": "model"}
    assert same(weights(here / "out/model"), weights(here / f"out/checkpoints/step_{step:06d}/model"))
    assert not same(weights(here / "out/model"), weights(here / "out/checkpoints/step_000007/model"))
    assert summary(here / "out")["evaluation"]["policy"]["kl"] == value  # it is the one that is compared
    said = capfd.readouterr().err.splitlines()[-1]
    assert f": out; model/ is that of step {step}, the best eval/kl: {value:.4g}; held out: " in said


def test_sft_keeps_its_best_too(here, tiny):
    assert tether(f"{SFT} --keep-best=-eval/loss --keep-checkpoints --model {tiny} --out out") == 0
    step, value = best_of(read_rows(here / "out" / "metrics.jsonl"), "eval/loss", -1.0)
    assert summary(here / "out")["best"] == {"step": step, "value": value, "path": "model"}
    assert same(weights(here / "out/model"), weights(here / f"out/checkpoints/step_{step:06d}/model"))


def test_a_reward_model_is_that_of_the_metric_in_place_of_its_own_choice(here, tiny):
    line = "reward --pairs pairs.jsonl --batch-size 4 --epochs 2 --evals-per-epoch 2 --patience 0 --quiet"
    assert tether(f"{line} --keep-best=-eval/margin --keep-checkpoints --model {tiny} --out out") == 0
    step, value = best_of(read_rows(here / "out" / "metrics.jsonl"), "eval/margin", -1.0)
    assert summary(here / "out")["best"] == {"step": step, "value": value, "path": "model"}
    assert summary(here / "out")["best_step"] == step
    assert same(weights(here / "out/model"), weights(here / f"out/checkpoints/step_{step:06d}/model"))


def test_a_metric_of_every_step_competes_where_there_are_checkpoints(here, tiny):
    assert (
        tether(f"{GRPO} --keep-best=-step --save-every 3 --keep-last 1 --keep-checkpoints --model {tiny} --out out")
        == 0
    )
    assert sorted(path.name for path in (here / "out/checkpoints").iterdir()) == ["step_000003", "step_000007"]
    assert summary(here / "out")["best"]["step"] == 3
    assert same(weights(here / "out/model"), weights(here / "out/checkpoints/step_000003/model"))


def test_without_it_the_model_is_the_last_one(here, tiny):
    assert tether(f"{GRPO} --save-every 3 --keep-checkpoints --model {tiny} --out out") == 0
    assert summary(here / "out")["best"] is None
    assert same(weights(here / "out/model"), weights(here / "out/checkpoints/step_000007/model"))


@pytest.mark.parametrize("name", ["grpo", "rejection-sampling"])
def test_an_interrupted_run_ends_with_the_same_best(name, here, tiny, monkeypatch):
    """A checkpoint within a step has the metrics of the step before and other weights: it is not the best."""
    line = f"{LINES[name]} --keep-best=-eval/kl --save-every 0 --keep-last 1 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    start, stops = Recorder.start, []

    def stopping(self):
        start(self)
        if self.recorded in (2, 4, 6) and self.recorded not in stops:
            stops.append(self.recorded)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "start", stopping)
    assert tether(f"{line} --out cut") == 75
    assert tether("resume cut") == 75
    assert tether("resume cut") == 75
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


def test_a_best_checkpoint_that_is_damaged_is_said_and_passed_over(here, tiny, monkeypatch, capfd):
    take, order = Recorder.take_best, []

    def damaging(self):
        self.checkpoints.wait()
        order.extend(path.name for _, path in self.checkpoints.ranked())
        file = self.directory.path / "checkpoints" / order[0] / "model/model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        return take(self)

    monkeypatch.setattr(Recorder, "take_best", damaging)
    line = f"{GRPO} --keep-best=-eval/kl --save-every 2 --keep-last 9 --keep-checkpoints --model {tiny} --out out"
    assert tether(line) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert f"{order[0]}: corrupt: model/model.safetensors is not as it was written; it is passed over" in said
    assert summary(here / "out")["best"]["step"] == int(order[1].removeprefix("step_"))
    assert same(weights(here / "out/model"), weights(here / "out/checkpoints" / order[1] / "model"))


@pytest.mark.parametrize(
    ("line", "metric", "meant"),
    [
        (GRPO, "rewrd", "did you mean reward?"),
        (GRPO, "-eval/loss", ""),
        (GRPO, "eval/rewards/nf", "did you mean eval/rewards/fn?"),
        (GRPO, "rewards/nf/mean", "did you mean rewards/fn/mean?"),
        (LINES["ppo"], "val/explained", "did you mean val/explained_variance?"),
        (SFT.replace("--eval-data held_texts.jsonl ", ""), "-eval/loss", "did you mean loss?"),
        ("reward --pairs pairs.jsonl --quiet", "eval/accurcy", "did you mean eval/accuracy?"),
    ],
)
def test_an_unknown_metric_is_refused_before_the_first_step(line, metric, meant, here, tiny, capfd, monkeypatch):
    monkeypatch.setattr(Recorder, "start", lambda _: pytest.fail("a step began"))
    assert tether(f"{line} --keep-best={metric} --model {tiny} --out out") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert f"--keep-best: the run has no metric '{metric.removeprefix('-')}'; {meant}" in said
    assert not (here / "out").exists()


def test_a_member_of_a_reward_is_refused_when_it_has_scored(here, tiny, capfd):
    assert tether(f"{GRPO} --keep-best rewards/fn/member/mean --model {tiny} --out out") == 2
    assert "the run has no metric 'rewards/fn/member/mean'" in capfd.readouterr().err
    assert not (here / "out").exists()


def test_a_finished_run_has_no_checkpoints_unless_asked_for(here, tiny):
    assert tether(f"{GRPO} --save-every 2 --model {tiny} --out out") == 0
    assert not {"checkpoints", "journal"} & {path.name for path in (here / "out").iterdir()}
    assert tether(f"{GRPO} --save-every 2 --keep-checkpoints --model {tiny} --out kept") == 0
    assert sorted(path.name for path in (here / "kept/checkpoints").iterdir()) == ["step_000006", "step_000007"]
    assert tether("resume kept --steps 8 --allow") == 0
    assert len(read_rows(here / "kept" / "metrics.jsonl")) == 8


def test_a_finished_run_without_checkpoints_is_not_begun_again_to_make_it_longer(here, tiny, capfd):
    assert tether(f"{GRPO} --model {tiny} --out out") == 0
    before = contents(here / "out")
    assert tether("resume out --steps 9 --allow") == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "out: the run is finished and its checkpoints were removed, so it cannot be made longer" in said
    assert contents(here / "out") == before


def test_a_kill_before_the_checkpoints_are_removed_leaves_that_to_resume(here, tiny, monkeypatch):
    class Killed(BaseException):
        pass

    def strike(_):
        raise Killed

    assert tether(f"{GRPO} --model {tiny} --out whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(recording, "remove_checkpoints", strike)
        with pytest.raises(Killed):
            tether(f"{GRPO} --model {tiny} --out cut")
    assert (here / "cut" / "summary.json").exists()
    assert list((here / "cut/checkpoints").iterdir())
    assert tether("resume cut") == 0
    assert not (here / "cut/checkpoints").exists()
    assert numbers(here / "cut") == numbers(here / "whole")


def test_a_short_run_of_the_embedded_model_is_small_on_disk(here):
    line = (
        "grpo --model base --prompts p.jsonl --reward r.py:fn --prompts-per-step 4 --group-size 4 --max-new-tokens 16 "
        f"--steps 12 {HELD_OUT} --quiet --out out"
    )
    assert tether(line) == 0
    size = sum(path.stat().st_size for path in (here / "out").rglob("*") if path.is_file())
    assert size < 40e6
