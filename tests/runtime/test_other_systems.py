"""tether imports where the system lacks what POSIX has, and what stands in for it works."""

from __future__ import annotations

import subprocess
import sys
import textwrap

WINDOWS = """
    import contextlib, ctypes, os, signal, subprocess, sys, types

    import torch, transformers  # they know Windows on their own
    with contextlib.suppress(ImportError):
        import psutil  # as does this, which transformers uses where it is installed

    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None  # importing it is an ImportError
    locked = {}

    def locking(descriptor, mode, count):  # of one process; the byte is at the position of the file
        assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 2**30)
        inode = os.fstat(descriptor).st_ino
        holder = locked.setdefault(inode, descriptor)
        try:
            held = holder != descriptor and os.fstat(holder).st_ino == inode
        except OSError:  # closed
            held, locked[inode] = False, descriptor
        if held:
            raise PermissionError(13, "Permission denied")

    class Kernel:
        class GetCurrentProcess:
            restype = None
            def __new__(cls):
                return 7

        class K32GetProcessMemoryInfo:
            argtypes = ()
            def __new__(cls, process, counters, size):
                assert (process, size) == (7, 72)
                counters._obj.PeakWorkingSetSize = 3 * 2**30
                return 1

    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    ctypes.WinDLL = lambda name, use_last_error: Kernel
    signal.SIGBREAK = signal.SIGUSR1
    for name in ("SIGURG", "pthread_kill"):
        delattr(signal, name)
    for name in ("O_NOFOLLOW", "O_CLOEXEC"):
        delattr(os, name)
"""
"""What Windows lacks, taken away, and what it has instead, imitated."""


def on_windows(code: str) -> str:
    """What ``code`` prints where the modules of POSIX are missing."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WINDOWS) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_and_what_stands_in_works(tmp_path):
    said = on_windows(f"""
        import importlib, pathlib, pkgutil, time
        import tether

        for module in pkgutil.walk_packages(tether.__path__, "tether."):
            importlib.import_module(module.name)
        from tether.errors import RunError
        from tether.runtime.device import peak_gib
        from tether.runtime.lock import Lock
        from tether.stop_requests import WAKE, DeadlineError, Interrupted, at_once, check, deadline, heeded
        import torch

        assert WAKE == signal.SIGBREAK
        assert peak_gib(torch.device("cpu")) == 3
        directory = pathlib.Path({str(tmp_path)!r})
        first = Lock(directory)
        assert (directory / ".lock").read_text().strip() == str(os.getpid())
        try:
            Lock(directory)
            raise AssertionError("locked twice")
        except RunError as error:
            assert f"in use by process {{os.getpid()}}" in str(error), error
        first.release()
        assert not list(directory.iterdir())
        Lock(directory).release()
        try:
            with deadline(0.2):
                while True:
                    time.sleep(0.01)
        except DeadlineError:
            print("deadline")
        try:
            with heeded(0.2):
                while True:
                    check()
                    time.sleep(0.01)
        except Interrupted as stop:
            print(stop)
        try:
            with heeded(0.2), at_once():
                while True:
                    time.sleep(0.01)
        except Interrupted as stop:
            print("at once:", stop)
        from tether.cli import main
        assert main([]) == 0
        assert main(["sft", "--model", "none", "--data", "none", "--out", str(directory / "out")]) == 2
    """)
    usage = said.index("tether 0")
    said, usage = said[:usage], said[usage:]
    assert "usage: tether COMMAND" in usage
    assert said.splitlines() == ["deadline", "its time limit", "at once: its time limit"]
