"""A full disk, and a limit on the size of files: the run stops, keeps what was complete, and can be resumed."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import contents, tether
from faulty import ALWAYS, assert_intact, assert_resumes, last_line
from runs import LINES
from tether.runtime import journal
from tether.runtime.checkpoint import Checkpoints
from tether.runtime.directory import RunDirectory
from tether.training import common, reward


def fill(disk: Path, *, spare: int = 0) -> None:
    """Fill the disk but for ``spare`` bytes."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - spare)


ONE_BY_ONE = "rejection-sampling --batch-size 1 --epochs 3 --rollouts-every 0"
FULL = {
    "a checkpoint": ("grpo --save-every 1", Checkpoints, "_written", 2, 16384, "checkpoints/step_000002"),
    "a checkpoint and the journal": ("grpo --save-every 1", Checkpoints, "_written", 2, 0, "checkpoints/step_000002"),
    "a checkpoint's tokenizer": ("ppo --save-every 1", Checkpoints, "_files_of_tokenizer", 1, 8192, "checkpoints"),
    "the metrics": ("sft --epochs 10 --save-every 20", RunDirectory, "log", 24, 0, "metrics.jsonl"),
    "the rollouts": ("ppo --save-every 1", RunDirectory, "rollouts", 3, 0, "rollouts/step_000003.parquet"),
    "the journal": ("grpo --save-every 1", journal, "write_rollouts", 3, 0, "journal/step_00000"),
    "the journal's scores": ("ppo --save-every 1", journal, "write_scores", 3, 0, "journal/step_00000"),
    "fine-tuning steps": (ONE_BY_ONE, RunDirectory, "append", 18, 0, "sft.jsonl"),
    "the model": ("grpo", common, "save_model", 1, 16384, "model"),
    "the model's tokenizer": ("sft", common, "save_model", 1, 110_592, "model"),
    "the reward model": ("reward", reward, "save_reward_model", 1, 16384, "model"),
    "the summary": ("sft", RunDirectory, "summary", 1, 0, "summary.json"),
}


@pytest.mark.parametrize("case", FULL.values(), ids=FULL)
def test_a_full_disk_stops_the_run_and_names_the_file(case, disk, tiny, uninterrupted, before, capfd):
    line, owner, name, n, spare, says = case
    command, *options = line.split()
    line = " ".join([LINES[command], *options, ALWAYS])
    before(owner, name, n, lambda: fill(disk, spare=spare))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    complaint = last_line(capfd)
    assert complaint.startswith(f"tether {command}: {disk}/out/{says}")
    assert "cannot be written (" in complaint
    assert "No space left on device" in complaint
    assert complaint.endswith("; resume with 'tether resume disk/out'")
    assert_intact(disk / "out")
    assert not (disk / "out" / "summary.json").exists()
    (disk / "filler").unlink()
    assert_resumes(Path("disk/out"), uninterrupted(line))


@pytest.mark.parametrize("spare", [0, 8192], ids=["full", "almost full"])
def test_a_disk_that_is_full_from_the_start_is_left_empty(spare, disk, tiny, capfd):
    line = f"{LINES['ppo']} {ALWAYS}"
    fill(disk, spare=spare)
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert "disk/out" in complaint
    assert "No space left on device" in complaint
    assert "resume" not in complaint
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    assert tether(f"{line} --model {tiny} --out disk/out") == 0


def test_a_run_on_a_disk_that_is_still_full_keeps_its_checkpoints(disk, tiny, uninterrupted, before, capfd):
    line = f"{LINES['ppo']} {ALWAYS} --save-every 1"
    before(RunDirectory, "log", 3, lambda: fill(disk))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    (disk / "filler").unlink()
    left = contents(disk / "out")
    fill(disk)
    assert tether("resume disk/out") == 2
    assert last_line(capfd).startswith("tether resume: disk/out")
    found = contents(disk / "out")
    assert {name: data for name, data in left.items() if name.startswith("checkpoints")} == {
        name: data for name, data in found.items() if name.startswith("checkpoints")
    }
    (disk / "filler").unlink()
    assert_resumes(Path("disk/out"), uninterrupted(line))


def test_a_limit_on_the_size_of_files_is_like_a_full_disk(here, tiny, uninterrupted, before, capfd):
    """``ulimit -f``: no file may grow past the limit. Small files fit, and checkpoints do not."""
    line = f"{LINES['ppo']} {ALWAYS} --save-every 2"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before(RunDirectory, "log", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (32768, limits[1])))
    try:
        assert tether(f"{line} --model {tiny} --out out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    complaint = last_line(capfd)
    assert complaint.startswith(f"tether ppo: {here}/out/checkpoints/step_000002: cannot be written (")
    assert "File too large" in complaint
    assert complaint.endswith("; resume with 'tether resume out'")
    assert assert_intact(here / "out") == []
    assert_resumes(Path("out"), uninterrupted(line))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root runs them directly")
def test_the_disk_tests_pass_in_a_user_namespace():
    """All tests of this directory that mount a disk, run as root of a new namespace."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("this system has no user namespaces")
    line = [*space, sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent), "-k", "disk"]
    done = subprocess.run(line, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
