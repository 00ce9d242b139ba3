"""What the tests of faults share: how a run ends after one, and how it continues."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file

from commandline import read_rows, tether
from comparison import difference
from tether.runtime.checkpoint import Checkpoints, Kept

ALWAYS = "--quiet --keep-last 1 --keep-checkpoints"


def last_line(capfd) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def assert_intact(run: Path) -> list[str]:
    """No partial file has a final name, and every checkpoint is as it was written; gives the checkpoints' names."""
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    saved = Checkpoints(run, None, Kept(last=1, best=None))
    names = [path.name for *_, path in saved.names() if saved.verified(path)]
    saved.close()
    read_rows(run / "metrics.jsonl")
    return names


def assert_resumes(run: Path, expected: Path) -> None:
    assert tether(f"resume {run}") == 0
    assert_intact(run)
    assert difference(run, expected) is None


def failing(body: str, calls: str) -> str:
    """A reward function that does ``body`` in those of its calls for which ``calls`` holds."""
    return (
        f"calls = []\n\ndef fn(completions, **_):\n    calls.append(1)\n    if len(calls) {calls}:\n        {body}\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def until(holds) -> None:
    """Wait until ``holds()``, for at most 30 seconds."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_same_weights(run: Path, expected: Path) -> None:
    """The trained weights are equal up to rounding."""
    found, weights = (load_file(path / "model" / "model.safetensors") for path in (run, expected))
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name


def token_budget(run: Path) -> int:
    """The token budget that fitted into memory, from the newest checkpoint."""
    *_, newest = sorted(run.glob("checkpoints/*/state.json"))
    state = json.loads(newest.read_text())["algorithm"]
    return state.get("tuning", state)["guard"]["token_budget"]
