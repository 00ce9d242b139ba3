"""A workspace per test, uninterrupted runs to compare with, a disk of its own, and ways to fail at a chosen moment."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import pytest
import torch

from commandline import tether, workspace
from faulty import mount, until
from tether.runtime.checkpoint import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that the tests start, so that all compute the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """The run of a command line without a fault; each is made once."""
    root, made = tmp_path_factory.mktemp("uninterrupted"), {}
    workspace(root)

    def of(line: str) -> Path:
        if line not in made:
            made[line] = root / f"out{len(made)}"
            with contextlib.chdir(root):
                assert tether(f"{line} --model {tiny} --out {made[line].name}") == 0
        return made[line]

    return of


@pytest.fixture
def disk(here):
    """A disk for this test alone, of 8 MB."""
    path = here / "disk"
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk; see test_the_disk_tests_pass_in_a_user_namespace")
    yield path
    while path.is_mount():
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def before(monkeypatch):
    """Do something just before the n-th call of a function, when no checkpoint is being written or removed but the one
    that the call is part of."""
    save, written = Checkpoints.save, []

    def noted(self, *arguments, **options):
        save(self, *arguments, **options)
        written.append(self.under_way)

    monkeypatch.setattr(Checkpoints, "save", noted)

    def at(owner, name, n, act):
        function, calls = getattr(owner, name), []

        def acting(*arguments, **options):
            calls.append(1)
            if len(calls) == n:
                if threading.current_thread() is threading.main_thread():
                    futures.wait(written)
                act()
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, acting)

    return at


NURSERY = """
import json, os, sys, time
from tether import cli
from tether.commands import TABLE
from tether.runtime.state import Snapshot

for command in TABLE:
    command.function()
for line in sys.stdin:
    order = json.loads(line)
    if pid := order.get("wait"):
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        os.chdir(order["directory"])
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        write, calls = Snapshot.write, []

        def slow(self, directory):
            write(self, directory)
            calls.append(1)
            if len(calls) >= order["from"]:
                time.sleep(order["seconds"])

        Snapshot.write = slow
        os._exit(cli.main(order["line"].split()))
"""
"""A process that has everything imported, has one thread, and forks: each fork runs one command line, and its
checkpoints can be slowed down."""


@pytest.fixture(scope="session")
def nursery():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def ask(**order) -> int:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture
def saving(here, tiny, nursery):
    """Start a run whose checkpoints from the second on each take ``seconds``, and wait until it writes that one."""

    def start(line, seconds):
        pid = nursery(directory=str(here), line=f"{line} --model {tiny} --out out", seconds=seconds, **{"from": 2})
        until(lambda: list((here / "out/checkpoints").glob(".step_000002.partial/state.json")))
        return pid

    return start
