"""Compares two or more sides: medians, ratios with their spread, shares of the hardware's limit.

Sides take turns within one run, in an order that reverses every round, so that other load on the machine affects all
alike. One warm-up turn per side does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.flops import SHAPES, Shape, Work
from benchmarks.hardware import bandwidth, matrix_rate
from benchmarks.worker import Spec

ROOT = Path(__file__).parents[1]
OURS = "tether"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of every worker. On cores shared with other work add OMP_WAIT_POLICY=PASSIVE: otherwise threads that spin
while they wait for each other make a step ten times as long. On idle cores it slows small products, by half here."""
QUIET = 0.1
"""Cores that may be busy on a machine that counts as idle."""


class Side:
    """A worker process and the answers it gave."""

    def __init__(self, contender: Contender, spec: Path) -> None:
        self.name, self.turns, self.failed = contender.name, list[dict[str, float]](), ""
        self.log = spec.with_name(f"{self.name.replace(' ', '_')}.log")
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [contender.python, "-m", f"benchmarks.{contender.module}", contender.task, str(spec)],
                cwd=ROOT,
                env=ENVIRONMENT | os.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if self._line() != "ready\n":
            raise SystemExit(f"{self.name} did not start\n{self.log.read_text()[-3000:]}")

    def turn(self) -> dict[str, float] | None:
        """One turn; the side is ready for the next when this returns. None if the worker died, see ``failed``."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        before = busy_seconds()
        answer = self._line()
        busy = busy_seconds() - before
        if not answer or self._line() != "ready\n":
            self.failed = self.log.read_text().strip().rpartition("\n")[2] or "died without output"
            return None
        facts: dict[str, float] = json.loads(answer)
        return facts | {"others": max(0.0, busy - facts["cpu_seconds"]) / facts["seconds"]}

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def busy_seconds() -> float:
    """Busy seconds of all cores together since the machine started, as Linux counts them."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(patience: float) -> None:
    """Return once the cores have been idle for two seconds, or after ``patience`` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(2)
        if busy_seconds() - before < 2 * QUIET:
            return


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How to start a side: the interpreter, the module of ``benchmarks`` and the task it is given."""

    name: str
    python: str
    module: str
    task: str


def ours(task: str, *, defaults: bool = False) -> Contender:
    """tether with the peer's settings; or with its own ``defaults``: products in bfloat16 where the hardware is faster
    in it, and a critic on the policy's states."""
    name, task = (f"{OURS}, defaults", f"{task}:defaults") if defaults else (OURS, task)
    return Contender(name=name, python=sys.executable, module="ours", task=task)


def peer(name: str, module: str, task: str, *, trl: str) -> Contender:
    python = ROOT / ".peers" / f"trl-{trl}" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is missing; set it up with: python -m benchmarks.peers setup")
    return Contender(name=name, python=str(python), module=module, task=task)


@dataclass(frozen=True)
class Spread:
    """Median and range of some measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(readings: Sequence[float]) -> Spread:
        return Spread(statistics.median(readings), min(readings), max(readings))


def ratio(theirs: Sequence[float], own: Sequence[float]) -> Spread:
    """The ratio of the medians, and the range of the ratios per round."""
    rounds = [a / b for a, b in zip(theirs, own, strict=True)]
    return Spread(statistics.median(theirs) / statistics.median(own), min(rounds), max(rounds))


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one benchmark."""

    title: str
    work: Work
    matrix_rate: float
    """Operations per second, the best of all rounds."""
    bandwidth: float
    """Bytes per second, the best of all rounds."""
    turns: Mapping[str, Sequence[Mapping[str, float]]]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Minimum seconds that the hardware needs for the work."""
        return self.work.seconds(matrix_rate=self.matrix_rate, bandwidth=self.bandwidth)

    def seconds(self, side: str) -> list[float]:
        return [turn["seconds"] for turn in self.turns[side]]

    def summary(self) -> dict[str, Any]:
        """The JSON output."""
        sides = {}
        for side in self.turns:
            spread = Spread.of(self.seconds(side))
            sides[side] = {
                "seconds": asdict(spread),
                "share_of_limit": self.limit / spread.median,
                "times_tether": asdict(ratio(self.seconds(side), self.seconds(OURS))),
                "turns": list(self.turns[side]),
            }
        return {
            "title": self.title,
            "limit_seconds": self.limit,
            "matrix_rate": self.matrix_rate,
            "bandwidth": self.bandwidth,
            "work": asdict(self.work),
            "sides": sides,
            "failed": dict(self.failed),
        }

    def show(self) -> None:
        table = Table(title=self.title, title_justify="left")
        for column in (
            "side",
            "seconds",
            "range",
            "x tether",
            "per round",
            "of the limit",
            "CPU s",
            "others",
            "peak MiB",
        ):
            table.add_column(column, justify="left" if column == "side" else "right")
        for side in self.turns:
            own, against = Spread.of(self.seconds(side)), ratio(self.seconds(side), self.seconds(OURS))
            table.add_row(
                side,
                f"{own.median:.2f}",
                f"{own.low:.2f}-{own.high:.2f}",
                f"{against.median:.2f}",
                f"{against.low:.2f}-{against.high:.2f}",
                f"{self.limit / own.median:.1%}",
                f"{statistics.median(turn['cpu_seconds'] for turn in self.turns[side]):.2f}",
                f"{statistics.median(turn['others'] for turn in self.turns[side]):.2f}",
                f"{max(turn['peak_rss_mib'] for turn in self.turns[side]):.0f}",
            )
        console = Console(width=120)
        console.print(table)
        console.print(
            f"limit {self.limit:.2f} s: {self.matrix_rate / 1e9:.0f} Gflop/s (large square product), "
            f"{self.bandwidth / 1e9:.1f} GB/s (triad); others: cores kept busy by other processes"
        )
        for side, reason in self.failed.items():
            console.print(f"{side} failed: {reason}", markup=False)


def contest(
    title: str, contenders: Sequence[Contender], spec: Spec, work: Work, *, rounds: int, patience: float
) -> Result:
    """``rounds`` turns of each contender. A peer that dies gets no more turns; if tether dies, the benchmark ends."""
    dtype = getattr(torch, spec.dtype)
    rates, widths = [], []
    with tempfile.TemporaryDirectory(prefix="duel-") as folder:
        path = spec.write(Path(folder) / "spec.json")
        sides = [Side(contender, path) for contender in contenders]
        for number in range(rounds + 1):
            rates.append(matrix_rate(spec.device, dtype))
            widths.append(bandwidth(spec.device))
            able = [side for side in sides if not side.failed]
            for side in able if number % 2 else reversed(able):
                wait_for_quiet(patience)
                answer = side.turn()
                if answer is None and side.name.startswith(OURS):
                    raise SystemExit(f"{side.name} died\n{side.log.read_text()[-3000:]}")
                if answer and number:
                    side.turns.append(answer)
                said = f"{answer['seconds']:.2f} s, others {answer['others']:.2f}" if answer else side.failed
                print(f"{title}: round {number} of {rounds}, {side.name}: {said}", file=sys.stderr, flush=True)
        for side in sides:
            side.close()
    return Result(
        title=title,
        work=work,
        matrix_rate=max(rates),
        bandwidth=max(widths),
        turns={side.name: side.turns for side in sides if not side.failed},
        failed={side.name: side.failed for side in sides if side.failed},
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=("cpu", "cuda"), default=device)
    options.add_argument("--shape", choices=tuple(SHAPES), help="model shape; by default tiny on cpu, 0.5b on cuda")
    options.add_argument("--rounds", type=int, default=5, help="turns per side, without the warm-up")
    options.add_argument("--patience", type=float, default=0.0, help="seconds to wait for idle cores, per turn")
    options.add_argument("--json", type=Path, help="write all results to this file")
    return options


def shape_of(args: argparse.Namespace) -> Shape:
    return SHAPES[args.shape or ("0.5b" if args.device == "cuda" else "tiny")]


def report(results: Sequence[Result], args: argparse.Namespace) -> None:
    """Print tables, and write everything as JSON if asked."""
    for result in results:
        result.show()
    if args.json:
        args.json.write_text(json.dumps([result.summary() for result in results], indent=2) + "\n")
