"""Two processes in one run directory: the second is refused until the first has ended, in whatever way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from commandline import REWARD, contents, tether
from faulty import ALWAYS, assert_resumes, failing, last_line, until
from runs import LINES


def test_a_second_process_in_a_run_directory_is_refused(here, tiny, uninterrupted, nursery, capfd):
    line = f"{LINES['grpo']} {ALWAYS}"
    (here / "r.py").write_text(failing("import time; open('asleep', 'w').close(); time.sleep(60)", "== 3"))
    pid = nursery(directory=str(here), line=f"{line} --model {tiny} --out out", seconds=0, **{"from": 1})
    until((here / "asleep").exists)
    (here / "r.py").write_text(REWARD)
    left = contents(here / "out")
    for second in ("resume out", f"{line} --overwrite --model {tiny} --out out"):
        assert tether(second) == 2
        assert f"out: in use by process {pid}; wait until it ends, or stop it" in last_line(capfd)
    assert contents(here / "out") == left
    os.kill(pid, signal.SIGKILL)
    assert nursery(wait=pid) == -signal.SIGKILL
    assert_resumes(Path("out"), uninterrupted(line))
