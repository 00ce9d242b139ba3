"""What checkpoints cost: the quickstart with one every ten steps against one at the end of each run alone.

    python -m benchmarks.checkpoints [--rounds 3]

Both sides run in this process and take turns. What is compared is the time of the four training runs, which is all that
checkpoints can change.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from tether.quickstart import Settings, quickstart

RUNS = ("reward", "rejection_sampling", "ppo", "grpo")


def seconds(save_every: int) -> tuple[float, float]:
    """Of the training runs, and of the whole quickstart."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        out = Path(scratch) / "quickstart"
        whole = quickstart(out, Settings(save_every=save_every))["seconds"]
        runs = [json.loads((out / name / "summary.json").read_text(encoding="utf-8"))["seconds"] for name in RUNS]
    return sum(runs), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    ratios = []
    for number in range(parser.parse_args().rounds):
        sides = (10, 0) if number % 2 else (0, 10)
        found = {every: seconds(every) for every in sides}
        (without, _), (saved, whole) = found[0], found[10]
        ratios.append((saved - without) / whole)
        print(f"round {number + 1}: training {without:.1f} s without checkpoints and {saved:.1f} s with:", end=" ")
        print(f"{ratios[-1]:+.1%} of the quickstart's {whole:.1f} s", flush=True)
    print(f"median {statistics.median(ratios):+.1%}")


if __name__ == "__main__":
    main()
