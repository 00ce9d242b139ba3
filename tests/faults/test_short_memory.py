"""Too little memory: work is done in smaller pieces with the same result, or the run stops and can be resumed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commandline import read_rows, tether
from faulty import ALWAYS, assert_intact, assert_resumes, assert_same_weights, last_line, token_budget
from runs import LINES
from tether.models.packing import GroupLayout
from tether.training import common


@pytest.mark.slow
def test_real_limits_on_memory_halve_the_work_with_the_same_result():
    """Limits on the address space, in another process: a library that failed to get memory may remember it."""
    tests = Path(__file__).parents[1] / "short_memory.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout


@contextlib.contextmanager
def crammed(most):
    """Models that raise the error of a full GPU for more tokens at a time than ``most()``."""

    def refuse(module, arguments, options):
        tokens = options["input_ids"].numel() if isinstance(options.get("layout"), GroupLayout) else 0
        if tokens > most():
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} tokens")

    applied = common.set_matmul_dtype

    def loaded(name, model):
        model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        return applied(name, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "set_matmul_dtype", loaded)
        yield


@pytest.mark.parametrize("command", LINES)
def test_every_command_computes_its_updates_in_pieces_that_fit(command, here, tiny, uninterrupted):
    """Memory is not really short: the model raises torch's error if a pass has more tokens than one row."""
    line = f"{LINES[command]} {ALWAYS}"
    with crammed(lambda: 14 if command == "sft" else 22):
        assert tether(f"{line} --model {tiny} --out out") == 0
    assert token_budget(here / "out") <= 32
    assert_same_weights(here / "out", uninterrupted(line))


@pytest.mark.parametrize("command", ["ppo", "rejection-sampling"])
def test_memory_that_is_too_short_for_one_row_saves_the_step_and_stops(command, here, tiny, uninterrupted, capfd):
    line = f"{LINES[command]} {ALWAYS}"
    rows = here / "out" / "metrics.jsonl"
    with crammed(lambda: 0 if rows.exists() and len(read_rows(rows)) == 2 else 10**9):
        assert tether(f"{line} --model {tiny} --out out") == 2
    complaint = last_line(capfd)
    assert "out of memory, however little is computed at a time (CUDA out of memory. Tried" in complaint
    assert complaint.endswith("; resume with 'tether resume out'")
    assert assert_intact(here / "out")[-1] == "step_000002.01"
    assert_resumes(Path("out"), uninterrupted(line))
