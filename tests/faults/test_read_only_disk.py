"""A disk that is or becomes read-only: the run stops, nothing on the disk changes, and it can be resumed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from commandline import contents, tether
from faulty import ALWAYS, assert_resumes, last_line, mount
from runs import LINES
from tether.runtime.checkpoint import Checkpoints
from tether.runtime.directory import RunDirectory
from tether.training import reward


def read_only(path: Path) -> None:
    """Mount a read-only view of the disk over it. Open files stay open, as when the kernel remounts a failing disk."""
    mount("--bind", path, path)
    mount("-o", "remount,bind,ro", path)


@pytest.mark.parametrize("out", ["disk/out", "disk"])
def test_a_disk_that_is_read_only_from_the_start_stops_the_run(out, disk, tiny, capfd):
    read_only(disk)
    assert tether(f"{LINES['ppo']} {ALWAYS} --model {tiny} --out {out}") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether ppo: {out}")
    assert "written" in complaint
    assert not list(disk.iterdir())


READ_ONLY = {
    "a checkpoint": ("grpo --save-every 1", Checkpoints, "_written", 2, "checkpoints/step_000002"),
    "the metrics": ("sft --save-every 4", RunDirectory, "log", 5, "metrics.jsonl"),
    "the model": ("reward", reward, "save_reward_model", 1, "model"),
}


@pytest.mark.parametrize("case", READ_ONLY.values(), ids=READ_ONLY)
def test_a_disk_that_becomes_read_only_stops_the_run(case, disk, tiny, uninterrupted, before, capfd):
    line, owner, name, n, says = case
    command, *options = line.split()
    line = " ".join([LINES[command], *options, ALWAYS])
    before(owner, name, n, lambda: read_only(disk))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    complaint = last_line(capfd)
    assert complaint.startswith(f"tether {command}: {disk}/out/{says}")
    assert "Read-only file system" in complaint
    assert complaint.endswith("; resume with 'tether resume disk/out'")
    left = contents(disk / "out")
    assert tether("resume disk/out") == 2
    assert "Read-only file system" in last_line(capfd)
    assert contents(disk / "out") == left
    subprocess.run(["umount", disk], check=True)
    assert_resumes(Path("disk/out"), uninterrupted(line))
