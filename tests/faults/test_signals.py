"""Signals while a checkpoint is written: no partial checkpoint gets its name, and the run can be resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from faulty import ALWAYS, assert_intact, assert_resumes
from runs import LINES
from tether.stop_requests import EXIT_CODE

SAVES = f"{LINES['ppo']} {ALWAYS} --save-every 1"


def test_a_signal_waits_for_the_checkpoint_and_saves_the_step(here, uninterrupted, saving, nursery):
    pid = saving(SAVES, 0.5)
    os.kill(pid, signal.SIGTERM)
    assert nursery(wait=pid) == EXIT_CODE
    assert (here / "log").read_text().endswith("resume with 'tether resume out'\n")
    *_, newest = assert_intact(here / "out")
    assert newest.startswith(("step_000002", "step_000003"))
    assert_resumes(Path("out"), uninterrupted(SAVES))


def test_a_second_signal_ends_the_process_while_it_writes_a_checkpoint(here, uninterrupted, saving, nursery):
    pid = saving(SAVES, 60)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert Path(f"/proc/{pid}").exists()
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert nursery(wait=pid) == EXIT_CODE
    assert time.monotonic() - started < 2
    assert "a second signal (SIGTERM), so it ends at once" in (here / "log").read_text()
    assert [path.name for path in (here / "out/checkpoints").glob(".*.partial")] == [".step_000002.partial"]
    assert_resumes(Path("out"), uninterrupted(SAVES))


def test_a_kill_leaves_the_checkpoint_before_the_one_being_written(here, uninterrupted, saving, nursery, capfd):
    pid = saving(SAVES, 60)
    os.kill(pid, signal.SIGKILL)
    assert nursery(wait=pid) == -signal.SIGKILL
    names = sorted(path.name for path in (here / "out/checkpoints").iterdir())
    assert names == [".step_000002.partial", "step_000001"]
    assert_resumes(Path("out"), uninterrupted(SAVES))
    assert "resuming from step 1" in capfd.readouterr().err
