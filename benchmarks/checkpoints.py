"""The cost of checkpoints: the quickstart with one every ten steps against one at the end of each run only.

    python -m benchmarks.checkpoints [--rounds 3]

Both sides run in this process and alternate. There are two results. The difference between the times of the four
training runs is the whole cost of checkpoints, but as noisy as the machine; the seconds that the runs spent saving,
during which they did nothing else, are steady, but exclude work in the background.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tether.quickstart import Settings, quickstart
from tether.runtime.recorder import Recorder

RUNS = ("reward", "rejection_sampling", "ppo", "grpo")


class Timed:
    """The seconds that all recorders spend saving."""

    def __init__(self) -> None:
        self.seconds, save = 0.0, Recorder.save

        def timed(recorder: Recorder, *given: Any, **options: Any) -> None:
            start = time.perf_counter()
            save(recorder, *given, **options)
            self.seconds += time.perf_counter() - start

        Recorder.save = timed  # type: ignore[method-assign]


def seconds(save_every: int, timed: Timed) -> tuple[float, float, float]:
    """Seconds of the training runs, of their saving, and of the whole quickstart."""
    timed.seconds = 0.0
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        out = Path(scratch) / "quickstart"
        whole = quickstart(out, Settings(save_every=save_every))["seconds"]
        runs = [json.loads((out / name / "summary.json").read_text(encoding="utf-8"))["seconds"] for name in RUNS]
    return sum(runs), timed.seconds, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    timed, differences, shares = Timed(), [], []
    for number in range(parser.parse_args().rounds):
        sides = (10, 0) if number % 2 else (0, 10)
        found = {every: seconds(every, timed) for every in sides}
        (without, few, _), (saved, many, whole) = found[0], found[10]
        differences.append((saved - without) / whole)
        shares.append((many - few) / whole)
        print(f"round {number + 1}: training {without:.1f} s without checkpoints and {saved:.1f} s with", end=": ")
        print(f"{differences[-1]:+.1%} of the quickstart's {whole:.1f} s", end="; ")
        print(f"saving {many - few:.2f} s, {shares[-1]:.1%}", flush=True)
    print(f"median {statistics.median(differences):+.1%}; saving {statistics.median(shares):.1%}")


if __name__ == "__main__":
    main()
