"""What a run leaves on disk, and that each piece of it is whole or absent."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from commandline import read_rows, tether, workspace
from tether.errors import GuardError, RunError
from tether.runtime import state as states
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.device import pick_device
from tether.runtime.directory import RunDirectory, read_metrics
from tether.runtime.files import atomic_write
from tether.runtime.journal import Journal
from tether.runtime.progress import ProgressLine
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.types import StepResult

LINE = "ppo --prompts p.jsonl --reward r.py:fn --steps 5 --prompts-per-step 2 --group-size 2 --max-new-tokens 4"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A run of PPO with a checkpoint every two steps and rollouts every third."""
    here = tmp_path_factory.mktemp("run")
    workspace(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        line = f"{LINE} --save-every 2 --keep-last 9 --rollouts-every 3 --quiet"
        assert tether(f"{line} --keep-checkpoints --out out --model", tiny) == 0
    return here / "out"


def test_metrics_are_one_row_per_step_in_the_fields_names(run):
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "completions/mean_length",
        "completions/clipped_ratio", "completions/mean_terminated_length", "step_time", "num_tokens", "rewards/fn/mean",
        "policy/approxkl", "policy/clipfrac", "loss/policy", "loss/value", "val/ratio", "grad_norm", "learning_rate",
    }  # fmt: skip
    assert all(names <= row.keys() for row in rows)
    assert all(row["step_time"] > 0 for row in rows)


def test_rollouts_are_one_row_per_completion(run):
    assert [path.name for path in (run / "rollouts").iterdir()] == ["step_000003.parquet"]
    rows = pyarrow.parquet.read_table(run / "rollouts" / "step_000003.parquet").to_pylist()
    assert len(rows) == 4
    assert rows[0].keys() == {
        "step", "prompt", "completion", "completion_ids", "mask", "sampler_logp", "finish_reason",
        "weights_version", "score", "rewards/fn", "kl", "advantage", "ref_logp", "advantages",
    }  # fmt: skip
    assert all(len(row["completion_ids"]) == len(row["sampler_logp"]) for row in rows)
    assert all(row["mask"] == [True] * len(row["completion_ids"]) for row in rows)
    assert {row["weights_version"] for row in rows} == {2}
    mean = sum(row["score"] for row in rows) / len(rows)
    assert read_rows(run / "metrics.jsonl")[2]["reward"] == pytest.approx(mean)


def test_checkpoints_are_written_every_n_steps_and_at_the_end(run):
    found = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step_000002", "step_000004", "step_000005"]
    for path in found:
        assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model", "state.json", "tensors.safetensors"]
    state = json.loads((found[0] / "state.json").read_text())["algorithm"]
    assert (state["step"], state["cursor"]["position"]) == (2, 4)
    tensors = load_file(found[0] / "tensors.safetensors")
    assert "algorithm.critic.head.weight" in tensors
    assert any(name.startswith("algorithm.optimizer.") and name.endswith("exp_avg") for name in tensors)


def test_the_last_checkpoint_holds_the_weights_of_the_model(run):
    last, model = (AutoModelForCausalLM.from_pretrained(run / p) for p in ("checkpoints/step_000005/model", "model"))
    earlier = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_000002/model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last.state_dict()[name])
    assert any(not torch.equal(tensor, earlier.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_summary_says_how_it_ended(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["last"]["reward"] == read_rows(run / "metrics.jsonl")[-1]["reward"]
    assert summary["seconds"] > 0


@pytest.mark.parametrize("make", [lambda path: path.write_text("new"), lambda path: path.mkdir()], ids=["file", "dir"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_interrupted_is_not_there(tmp_path, make, error):
    def interrupted():
        with atomic_write(tmp_path / "target") as partial:
            make(partial)
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_an_interruption_and_is_replaced_otherwise(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(RunError, match="No such file"), atomic_write(target) as partial:
        partial.with_name("no").joinpath("where").write_text("new")
    assert target.read_text() == "old"
    (tmp_path / ".target.partial").write_text("left by a process that was killed")
    with atomic_write(target) as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_crash_in_a_checkpoint_leaves_no_checkpoint(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(states, "save_file", full)
    assert tether(f"{LINE} --quiet --save-every 2 --out out --model", tiny) == 2
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    assert len(read_metrics(tmp_path / "out")) == 2


def test_a_directory_is_made_with_its_first_row(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "run", {"command": "test", "seed": 1})
    assert not (tmp_path / "a").exists()
    directory.log({"step": 1.0})
    directory.log({"step": 2.0})
    assert read_metrics(directory.path) == [{"step": 1.0}, {"step": 2.0}]
    assert (directory.path / "config.yaml").read_text() == "format: 3\ncommand: test\nseed: 1\n"


def test_what_a_run_left_that_was_killed_while_it_made_its_directory_is_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("data.json", ".fingerprints.json.partial", ".lock"):
        (tmp_path / "run" / name).write_text("half")
    directory = RunDirectory(tmp_path / "run", {}, data=[{"rows": 1}])
    directory.log({"step": 1.0})
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == [{"rows": 1}]
    assert not (tmp_path / "run" / ".fingerprints.json.partial").exists()


def test_a_directory_taken_meanwhile_is_not_touched(tmp_path):
    directory = RunDirectory(tmp_path / "run", {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a run"):
        directory.log({"step": 1.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_named_and_not_written(tmp_path, value):
    directory = RunDirectory(tmp_path / "run", {})
    recorder = Recorder(
        directory=directory,
        checkpoints=Checkpoints(directory.path, None, Kept(last=1, best=None)),
        journal=Journal(directory),
        progress=ProgressLine("ppo", 2, quiet=True),
        state=RunState(None),
        model=torch.nn.Module(),
        device=torch.device("cpu"),
        matrix_rate=1e9,
    )
    row = {"num_tokens": 4.0, "flops/update": 1e3, "time/update": 0.1}
    recorder.record(1, StepResult(metrics={**row, "kl": 0.5}))
    with pytest.raises(GuardError, match=r"ppo step 2: kl is not finite"):
        recorder.record(2, StepResult(metrics={**row, "kl": value}))
    assert [row["kl"] for row in read_metrics(directory.path)] == [0.5]


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
