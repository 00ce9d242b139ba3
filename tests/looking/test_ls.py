"""``tether ls``: every run below a directory, with its state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import tether, write_rows
from tether.looking.ls import in_bytes, listed, run_directories
from tether.report.state import is_locked, state_of
from tether.report.view import RunView


def a_run(path: Path, *rows: dict, summary: dict | None = None, **config) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in {"command": "ppo", **config}.items())
    )
    write_rows(path / "metrics.jsonl", list(rows))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def state(path: Path) -> str:
    return state_of(path, RunView.read(path))


def test_runs_are_found_and_what_is_inside_of_them_is_not(tmp_path):
    a_run(tmp_path / "b" / "c")
    a_run(tmp_path / "a")
    a_run(tmp_path / "a" / "ppo")
    a_run(tmp_path / "a" / "checkpoints" / "x")
    a_run(tmp_path / ".hidden")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = [str(path.relative_to(tmp_path)) for path in run_directories(tmp_path, 3)]
    assert found == ["a", "a/ppo", "b/c"]
    assert [path.name for path in run_directories(tmp_path, 1)] == ["a"]
    assert list(run_directories(tmp_path / "a", 0)) == [tmp_path / "a"]


def test_states_of_runs(tmp_path):
    assert state(a_run(tmp_path / "begun")) == "interrupted"
    assert state(a_run(tmp_path / "done", summary={"steps": 2, "ended": None})) == "finished"
    assert state(a_run(tmp_path / "early", summary={"ended": "kl above 3"})) == "finished: kl above 3"
    alarmed = a_run(tmp_path / "alarmed")
    alarms = [
        {"step": 1, "message": "m", "monitor": name, "stop": stop} for name, stop in (("a", False), ("flat", True))
    ]
    write_rows(alarmed / "alarms.jsonl", alarms)
    assert state(alarmed) == "stopped by flat"


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path):
    run = a_run(tmp_path / "run")
    assert not is_locked(run)
    code = (
        "import sys, time; from pathlib import Path; from tether.runtime.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert state(run) == "running"
        assert is_locked(run)  # and looking has not taken the lock
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    assert (run / ".lock").exists()
    assert state(run) == "interrupted"


def test_a_lock_file_of_a_process_that_has_another_number_now_is_no_lock(tmp_path):
    run = a_run(tmp_path / "run")
    (run / ".lock").write_text(f"{os.getpid()}\n")
    assert not is_locked(run)
    assert (run / ".lock").exists()


def test_what_is_listed_of_a_run(tmp_path):
    rows = [{"step": 1.0, "reward": 0.1, "kl": 0.0}, {"step": 2.0, "reward": 0.5, "kl": 1.5, "loss": 3.0}]
    found = listed(a_run(tmp_path / "x" / "run", *rows, steps=10), tmp_path)
    assert (found.path, found.command, found.step, found.total) == ("x/run", "ppo", 2, 10)
    assert found.figures == {"reward": 0.5, "kl": 1.5}
    assert found.size == sum(file.stat().st_size for file in (tmp_path / "x" / "run").iterdir())
    assert 0 <= found.age < 60
    assert listed(a_run(tmp_path / "sft", {"step": 3.0, "loss": 2.0}), tmp_path).figures == {"loss": 2.0}


def test_the_list_shows_differing_options_and_survives_a_damaged_run(tmp_path, capsys):
    for name, coef in (("a", 0.1), ("b", 0.2)):
        a_run(tmp_path / name, {"step": 4.0, "reward": 0.25}, steps=8, kl_coef=coef, seed=0)
    damaged = a_run(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text("garbage\n")
    assert tether("ls", tmp_path) == 0
    out = capsys.readouterr().out
    assert "4/8" in out
    assert "reward 0.25" in out
    assert "unreadable" in out
    assert "options of the ppo runs that differ" in out
    assert "kl_coef" in out
    assert "seed" not in out
    assert tether("ls --json", tmp_path) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["path"], row["config"].get("kl_coef")) for row in rows] == [("a", 0.1), ("b", 0.2), ("damaged", None)]


def test_names_are_not_wrapped_and_many_runs_have_no_options_without_a_terminal(tmp_path, capsys):
    names = [f"{'a-long-name-' * 10}{i}" for i in range(9)]
    for i, name in enumerate(names):
        a_run(tmp_path / name, {"step": 4.0}, kl_coef=i)
    assert tether("ls", tmp_path) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert "kl_coef" not in out
    assert "at most 8 runs" in out
    (tmp_path / names[0] / "config.yaml").unlink()
    assert tether("ls", tmp_path) == 0
    assert "kl_coef" in capsys.readouterr().out


def test_a_directory_without_runs_and_one_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tether("ls") == 0
    assert "No runs within 3 directories of ." in capsys.readouterr().out
    assert tether("ls nowhere") == 2
    assert "nowhere: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (41_400_000, "41 MB"), (521 * 10**9, "521 GB")],
)
def test_sizes(size, shown):
    assert in_bytes(size) == shown
