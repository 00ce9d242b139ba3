"""The script for Slurm of docs/remote.md, with stand-ins for what belongs to a cluster."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "remote.md"
PATIENCE = 300
"""Seconds; machines may be busy."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")]


@pytest.fixture
def job(tiny, tmp_path):
    """A home directory with the environment, and the script of the page with a tiny model."""
    (script,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    begin = "tether grpo --model base --prompts prompts.jsonl --reward length:20 --steps 2000"
    assert begin in script
    smaller = f"tether grpo --model {tiny} --prompts prompts.jsonl --reward length:3 --steps 100000 --group-size 2"
    smaller += " --prompts-per-step 2 --max-new-tokens 4 --rollouts-every 0"
    (tmp_path / "job.sh").write_text(script.replace(begin, smaller), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    programs = tmp_path / "tether-env" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:{Path(sys.executable).parent}:$PATH"\n', encoding="utf-8")
    (programs / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$HOME/requeued"\n', encoding="utf-8")
    (programs / "scontrol").chmod(0o755)
    return tmp_path


def run_until_the_limit(home: Path) -> tuple[int, str]:
    """Run the job until it has done a few steps more, then signal the script as Slurm does; gives its exit code and
    what it wrote."""
    rows = home / "runs" / "grpo" / "metrics.jsonl"
    before = rows.read_bytes().count(b"\n") if rows.exists() else 0
    environment = {**os.environ, "HOME": str(home), "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    with (home / "job.log").open("ab") as log:
        script = subprocess.Popen(["bash", "job.sh"], cwd=home, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + PATIENCE
        while not rows.exists() or rows.read_bytes().count(b"\n") < before + 3:
            assert script.poll() is None, (home / "job.log").read_text(encoding="utf-8")
            assert time.monotonic() < limit
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)  # to the script alone: B:TERM
        code = script.wait(PATIENCE)
    return code, (home / "job.log").read_text(encoding="utf-8")


def test_a_job_at_its_limit_saves_and_is_queued_again_and_then_resumes(job):
    code, written = run_until_the_limit(job)
    assert code == 75
    assert "stopped by SIGTERM in step" in written
    assert (job / "requeued").read_text(encoding="utf-8") == "requeue 7\n"
    code, written = run_until_the_limit(job)
    assert code == 75
    assert "runs/grpo: resuming from step" in written
    assert (job / "requeued").read_text(encoding="utf-8") == "requeue 7\n" * 2


def test_a_job_that_fails_is_not_queued_again(job):
    (job / "prompts.jsonl").write_text("{}\n", encoding="utf-8")
    environment = {**os.environ, "HOME": str(job), "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "job.sh"], cwd=job, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not (job / "requeued").exists()
    assert not (job / "runs").exists()
