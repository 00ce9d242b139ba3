"""A short run of the crash harness, and that the comparison it makes can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commandline import read_rows, tether, workspace, write_rows
from comparison import difference


@pytest.mark.slow
def test_runs_that_are_killed_and_resumed_are_bitwise_uninterrupted_ones():
    """Two SIGKILLs and a SIGTERM for each of the five commands; ``python -m tests.crash --kills N`` sends more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", "--kills", "10", "--terms", "5", "--seed", "0"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 SIGKILL bitwise equal" in done.stdout
    assert "5 of 5 SIGTERM bitwise equal" in done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("crash")
    workspace(folder)
    line = f"grpo --prompts {folder}/p.jsonl --reward {folder}/r.py:fn --group-size 2 --steps 2 --max-new-tokens 4"
    assert tether(f"{line} --prompts-per-step 2 --quiet --model {tiny} --out {folder}/uninterrupted") == 0
    return folder / "uninterrupted"


def weight(run):
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


def figure(run):
    rows = read_rows(run / "metrics.jsonl")
    rows[1]["reward"] += 1e-12
    write_rows(run / "metrics.jsonl", rows)


def step_twice(run):
    rows = read_rows(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", [*rows, rows[-1]])


def completion(run):
    shutil.copy(run / "rollouts" / "step_000001.parquet", run / "rollouts" / "step_000002.parquet")


def half(run):
    (run / ".model.partial").mkdir()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (weight, "model/model.safetensors, model.norm.weight"),
        (figure, "metrics.jsonl, row 2, reward"),
        (step_twice, "metrics.jsonl, row 3, step"),
        (completion, "rollouts/step_000002.parquet"),
        (half, ".model.partial is only in"),
    ],
)
def test_the_smallest_difference_is_named(change, named, uninterrupted, tmp_path):
    run = tmp_path / "struck"
    shutil.copytree(uninterrupted, run)
    assert difference(run, uninterrupted) is None
    change(run)
    assert difference(run, uninterrupted).startswith(named)


def test_durations_and_the_path_of_a_run_are_not_compared(uninterrupted, tmp_path):
    run = tmp_path / "struck"
    shutil.copytree(uninterrupted, run)
    rows = [row | {"step_time": 9.0, "time/update": 9.0, "mfu": 0.5} for row in read_rows(run / "metrics.jsonl")]
    write_rows(run / "metrics.jsonl", rows)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "seconds": 9.0}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(uninterrupted), str(run)))
    assert difference(run, uninterrupted) is None
