"""The benchmark of one card: its code, run on the CPU at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import PARTS, TOY, Case

ROOT = Path(__file__).resolve().parents[1]
TOY_CASE = Case("cpu", "tiny", TOY)
OWN_PROCESS = ("hardware", "tests")
"""Parts that take too long here, or are tests themselves."""


def run(*arguments):
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_a_part_writes_its_figures_and_one_that_is_not_there_is_refused(tmp_path):
    done = run("grpo-0.5b-lora", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    figures = written["parts"]["grpo-0.5b-lora"]
    assert figures.keys() == {"step s", "generate s", "update s", "logprob gap nats"}
    assert all(value >= 0 for value in figures.values())
    assert written["machine"].keys() >= {"device", "torch", "transformers", "commit"}
    assert "| grpo-0.5b-lora | step s" in done.stdout
    assert run("nothing", "--device", "cpu").returncode == 2
    assert "rollout-1.5b" in run("--list").stdout


@pytest.mark.parametrize("name", [name for name in PARTS if name not in OWN_PROCESS])
def test_every_part_gives_figures_that_json_holds(name):
    figures = PARTS[name].run(TOY_CASE)
    assert json.loads(json.dumps(figures)) == figures
    assert all(value > 0 for key, value in figures.items() if key.endswith((" s", "tokens/s")))
    assert figures


def test_two_parts_by_what_they_must_find():
    found = PARTS["precision"].run(TOY_CASE)
    assert found["largest gap nats"] < 1e-4
    assert found["same alone"] == "True"
    model, _ = TOY_CASE.model()
    weights = sum(p.numel() for p in model.parameters())
    # bfloat16 weights; their masters and the two moments of AdamW in float32
    assert PARTS["checkpoint-0.5b"].run(TOY_CASE)["GiB"] * 2**30 == pytest.approx(weights * (2 + 4 + 8), rel=0.05)


def test_without_a_package_a_part_is_skipped_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)
    assert PARTS["tests"].run(TOY_CASE) == {"skipped": "no pytest here"}
    assert PARTS["grpo-1.5b-lora"].run(TOY_CASE) == {"skipped": "no peft here"}


def test_a_step_that_was_skipped_is_no_figure():
    with pytest.raises(RuntimeError, match="skipped"):
        gpu_parts.updated({"time/update": 0.1})


def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    kept = tmp_path / "pid"
    script = f"import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, file=open({str(kept)!r}, 'w'))"
    started = time.monotonic()
    assert gpu.limited([sys.executable, "-c", f"{script}; p.wait()"], 3.0) is None
    assert time.monotonic() - started < 30
    pid = int(kept.read_text())
    for _ in range(100):  # until whoever adopted it has reaped it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("what the part started is still running")


def test_what_a_machine_lacks_is_unknown():
    assert gpu.said("no-such-program-anywhere", "--version") == "unknown"
    assert gpu.said(sys.executable, "-c", "raise SystemExit(3)") == "unknown"
    assert gpu.said(sys.executable, "-c", "print('12.8')") == "12.8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so():
    done = run()
    assert done.returncode == 2
    assert "there is no CUDA device" in done.stderr
