"""Signals before a command trains, and to commands that do not train: one line, and the exit code of a stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from commandline import tether, workspace
from tether import cli
from tether.commands import TABLE
from tether.stop_requests import EXIT_CODE

STOPS = "import os, signal\nos.kill(os.getpid(), signal.{name})\ndef fn(completions): return [0.0] * len(completions)\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator:
    """A workspace, in a process that handles SIGTERM as the program does."""
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    before = signal.signal(signal.SIGTERM, cli.interrupt)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("line", "when"),
    [
        ("grpo --prompts p.jsonl --out run --model", " before training began; give the command again"),
        ("eval --prompts p.jsonl --model", ""),
    ],
)
def test_a_signal_while_loading_is_one_line(line, when, name, here, tiny, capsys):
    (here / "stops.py").write_text(STOPS.format(name=name))
    assert tether(line, tiny, "--reward", "stops.py:fn") == EXIT_CODE
    assert capsys.readouterr().err.splitlines() == [f"tether {line.split()[0]}: stopped by {name}{when}"]
    assert not (here / "run").exists()


def test_a_signal_before_the_command_is_known():
    assert cli.stopped_outside_a_run([], "SIGINT", TABLE) == "stopped by SIGINT"
    assert cli.stopped_outside_a_run(["resume", "run"], "SIGINT", TABLE).endswith("give the command again")


def test_the_program_handles_sigterm():
    code = "import signal, tether.cli as c; c.main = lambda: print(signal.getsignal(15) is c.interrupt) or 0; c.run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_what_cannot_be_resumed_is_one_line_that_says_why(here, capsys):
    (here / "file").write_text("")
    (here / "plain").mkdir()
    for name in ("a", "b"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "config.yaml").write_text("")
    for given, said in {
        "nowhere": "nowhere: no such directory; give the directory that --out named",
        "file": "file: a file, and a run is a directory; give the directory that --out named",
        "plain": "plain: no run to resume: config.yaml is missing; a run that ended before its first step leaves none; "
        "give its command again",
        "runs": "runs: no run to resume: config.yaml is missing; it holds runs: runs/a, runs/b",
    }.items():
        assert tether("resume", given) == 2
        assert capsys.readouterr().err.splitlines() == [f"tether resume: {said}"]
