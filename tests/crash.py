"""Runs that are killed at random times and resumed until they end must leave what an uninterrupted run leaves.

    python -m tests.crash [--kills 100] [--terms 0] [--seed 0] [--commands grpo ppo] [--options='--dtype bfloat16']

Half of the SIGKILLs (``--kills``: their number over all commands) come at a time drawn uniformly from the duration of
an uninterrupted run, start and end included; the others just before one of the changes that the run makes to files,
which are the dangerous moments. SIGTERM (``--terms``) comes at any time, and has to end a run within seconds with the
code for "interrupted". A resumed run may be struck again. Compared bit for bit is all of the run directory but
durations: weights, checkpoints, every row of metrics, every completion, and which files there are.

Each attempt is a fork of this process, which has everything imported already; ``--spawn`` starts new processes. The
exit code is 0 if all are equal. Otherwise it is 1, the first difference is named, and the directories are kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # before torch makes its threads, which a fork would not have
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

import torch

from commandline import workspace
from comparison import difference
from runs import STRUCK
from tether import cli
from tether.commands import TABLE
from tether.runtime.lock import NAME as LOCK
from tether.stop_requests import EXIT_CODE
from tiny import make_model

ALWAYS = "--model tiny --learning-rate 1e-3 --save-every 1 --quiet"
AGAIN, MOST = 0.5, 4
"""The probability that a resumed run is struck again, and the most strikes per run."""
AT_A_FILE = 0.5
"""The share of kills that come just before a change to a file: one of these, or opening to write."""
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
GRACE, HUNG = 5.0, 120.0
"""Seconds within which a signal has to end a run of this size, and after which a run is given up."""


class RunFailedError(Exception):
    """A run that did not end as it should, or left something else."""


@dataclass
class Tally:
    """What became of one command's strikes."""

    strikes: int = 0
    runs: int = 0
    equal: int = 0
    slowest: float = 0.0  # seconds from a signal to the end of the process

    def __str__(self) -> str:
        return f"{self.strikes:4d} in {self.runs:3d} runs, {self.equal:4d} bitwise equal, ended in {self.slowest:.2f} s"


@dataclass
class Harness:
    """Strikes runs in the directory that this process is in."""

    seed: int
    spawn: bool
    options: str
    uninterrupted: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Seconds and changes to files of each command's uninterrupted run, which is in ``uninterrupted/COMMAND``."""
    runs: int = 0

    def prepare(self, command: str) -> None:
        """The uninterrupted run of ``command``."""
        start = time.monotonic()
        pid, log = self.launch(command, directory := Path("uninterrupted", command))
        if code := wait(pid, HUNG):
            raise RunFailedError(f"{directory}: ends with {code}: {log.read_text()[-1000:]}")
        changes = 0 if self.spawn else int(log.read_text().split()[-1])
        self.uninterrupted[command] = time.monotonic() - start, changes

    def strike(self, command: str, number: signal.Signals, tally: Tally, *, most: int) -> None:
        """One run of ``command``, struck at most ``most`` times, resumed until it ends, and compared."""
        self.runs, tally.runs = self.runs + 1, tally.runs + 1
        rng, directory = random.Random(f"{self.seed} {self.runs}"), Path("struck", f"{command}-{self.runs}")
        expected = -number if number == signal.SIGKILL else EXIT_CODE
        seconds, changes = self.uninterrupted[command]
        strikes, code = 0, None
        while code != 0:
            again = strikes < most and (not strikes or rng.random() < AGAIN)
            at_a_file = again and number == signal.SIGKILL and not self.spawn and rng.random() < AT_A_FILE
            doomed = rng.randrange(changes) if at_a_file else -1
            instant = rng.uniform(0, seconds) if again and not at_a_file else HUNG
            when = f"at change {doomed}" if at_a_file else f"at {instant:.2f} s"
            pid, log = self.launch(command, directory, doomed)
            code, taken = wait(pid, instant), 0.0
            if code is None:
                code, taken = send(pid, number)
            if code == expected and again:
                print(f"{self.runs:4d}  {command:<18} {number.name} {when:<14}  {on_disk(directory)}", flush=True)
                strikes, tally.strikes, tally.slowest = strikes + 1, tally.strikes + 1, max(tally.slowest, taken)
            elif code == -signal.SIGTERM and not (directory / LOCK).exists():
                continue  # has not started, or has ended: there is nothing to lose
            elif code != 0:
                after = f"{taken:.1f} s after {number.name} {when}" if again or taken else "not struck"
                raise RunFailedError(f"{directory}: ends with {code}, {after}: {log.read_text()[-1000:]}")
        if found := difference(directory, Path("uninterrupted", command)):
            raise RunFailedError(f"{directory}: {found}")
        tally.equal += strikes
        shutil.rmtree(directory)

    def launch(self, command: str, directory: Path, doomed: int = -1) -> tuple[int, Path]:
        """Start the command, or resume the run in ``directory``; gives the process id and the log."""
        line = f"{STRUCK[command]} {ALWAYS} {self.options} --out {directory}"
        arguments = ["resume", str(directory)] if (directory / "config.yaml").is_file() else line.split()
        log = directory.with_name(f"{directory.name}.log")
        log.parent.mkdir(exist_ok=True)
        return os.fork() or self.become(arguments, log, doomed), log

    def become(self, arguments: list[str], log: Path, doomed: int) -> NoReturn:
        """In the fork: be ``tether ARGUMENTS``, with all output at the end of ``log``."""
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            if self.spawn:
                os.execv(sys.executable, [sys.executable, "-m", "tether.cli", *arguments])
            torch.seed()  # two processes have no random numbers in common
            count = die_before(doomed)
            code = cli.main(arguments)
            print("changes to files:", count[0])
        except BaseException:
            traceback.print_exc()
        finally:  # the fork must not continue as a second harness
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def die_before(doomed: int) -> list[int]:
    """Count this process's changes to files and directories, and kill it just before number ``doomed``, from 0."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if count[0] == doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(hook)
    return count


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process (that of a signal is negative), or None if it still runs after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def send(pid: int, number: signal.Signals) -> tuple[int | None, float]:
    """Signal a process, and kill it if that does not end it in time; gives the exit code and the seconds to the end."""
    start = time.monotonic()
    os.kill(pid, number)
    code = wait(pid, GRACE)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        code = wait(pid, HUNG)
    return code, time.monotonic() - start


def on_disk(directory: Path) -> str:
    """The progress of a run, by its files."""
    if not directory.is_dir():
        return "before there is a directory"
    saved = sorted(path.name for path in directory.glob("checkpoints/step_*"))
    halves = sorted(path.name for path in directory.rglob(".*.partial"))
    return ", ".join([f"at {saved[-1]}" if saved else "before the first checkpoint", *halves])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, spread evenly over the commands")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERMs, likewise, in runs of their own")
    parser.add_argument("--seed", type=int, default=0, help="decides the times, as shares of a run")
    parser.add_argument("--commands", nargs="+", choices=STRUCK, default=list(STRUCK), metavar="COMMAND")
    parser.add_argument("--options", default="", help="more options for every command, in one text")
    parser.add_argument("--spawn", action="store_true", help="new processes instead of forks")
    given = parser.parse_args()
    for command in TABLE:  # imports all that commands need
        command.function()
    folder = Path(tempfile.mkdtemp(prefix="tether-crash-"))
    os.chdir(folder)
    workspace(folder)
    make_model(folder / "tiny")
    print(f"seed {given.seed}, in {folder}")
    harness, lines, failures = Harness(given.seed, given.spawn, given.options), [], 0
    for command in given.commands:
        harness.prepare(command)
    for number, total in ((signal.SIGKILL, given.kills), (signal.SIGTERM, given.terms)):
        tallies = {command: Tally() for command in given.commands}
        for i, (command, tally) in enumerate(tallies.items()):
            quota = (total + i) // len(tallies)
            while tally.strikes < quota:
                try:
                    harness.strike(command, number, tally, most=min(MOST, quota - tally.strikes))
                except RunFailedError as failure:
                    print(f"FAILURE  {failure}")
                    failures += 1
        lines += [f"{command:<20}{number.name}  {tally}" for command, tally in tallies.items() if tally.strikes]
        if total:
            lines.append(f"{sum(tally.equal for tally in tallies.values())} of {total} {number.name} bitwise equal\n")
    print("", *lines, sep="\n")
    if not failures:
        os.chdir("/")
        shutil.rmtree(folder)
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(main())
