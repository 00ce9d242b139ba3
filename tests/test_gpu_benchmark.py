"""The benchmark of one card: its code, run on the CPU at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_a_part_writes_its_figures_and_one_that_is_not_there_is_refused(tmp_path):
    done = run("grpo-0.5b-lora", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    figures = written["parts"]["grpo-0.5b-lora"]
    assert figures.keys() == {"step s", "generate s", "update s", "logprob gap"}
    assert all(value >= 0 for value in figures.values())
    assert written["machine"].keys() >= {"device", "torch", "transformers", "commit"}
    assert "| grpo-0.5b-lora | step s" in done.stdout
    assert run("nothing", "--device", "cpu").returncode == 2
    assert "rollout-1.5b" in run("--list").stdout


def test_without_a_card_it_says_so():
    import torch

    if not torch.cuda.is_available():
        done = run()
        assert done.returncode == 2
        assert "there is no CUDA device" in done.stderr
