"""The commands, run in this process as a shell would run them, and small files for them to read."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

from tether.cli import main
from tether.runtime.recorder import TIMINGS

REWARD = "def fn(completions, **_):\n    return [float(len(c) % 5) for c in completions]\n"


def tether(line: str, *more: object) -> int:
    """``tether("grpo --model DIR", "--out", path)``: the exit code."""
    return main([*line.split(), *map(str, more)])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def workspace(directory: Path) -> None:
    """Prompts, pairs and demonstrations, some of them held out, and a reward function."""
    write_rows(directory / "p.jsonl", [{"prompt": f"Word {i} is", "answer": str(i)} for i in range(5)])
    pairs = [{"prompt": f"Q{i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(20)]
    write_rows(directory / "pairs.jsonl", pairs)
    write_rows(directory / "texts.jsonl", [{"prompt": f"One {i}", "completion": " two"} for i in range(8)])
    write_rows(directory / "held_prompts.jsonl", [{"prompt": f"Sentence {i} is", "answer": str(i)} for i in range(3)])
    write_rows(directory / "held_texts.jsonl", [{"prompt": f"Two {i}", "completion": " three"} for i in range(3)])
    (directory / "r.py").write_text(REWARD)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file and directory below ``directory``."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")
    }


def untimed(rows: list[dict]) -> list[dict]:
    """Rows of metrics without those that vary from run to run."""
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


def numbers(path: Path, *, without: tuple[str, ...] = ()) -> dict:
    """All of a finished run that is the same when it is repeated, however often it was interrupted or saved: rows, less
    the metrics ``without``, rollouts, summary and weights."""
    rows = {file.name: untimed(read_rows(file)) for file in path.glob("*.jsonl")}
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    summary |= {"seconds": 0.0, "last": untimed([summary.get("last", {})])}
    for row in [*rows["metrics.jsonl"], *summary["last"]]:
        for name in without:
            row.pop(name, None)
    binary = [*path.glob("rollouts/*.parquet"), *path.glob("model/*.safetensors")]
    return {"summary": summary, **rows, **{file.name: file.read_bytes() for file in binary}}


def assert_resumes(line: str, *, before: int = 6) -> None:
    """Run a command into ``whole``; and into ``cut``, where it is stopped by a signal before its optimizer step
    ``before`` and resumed. Both must have the same numbers."""
    assert tether(f"{line} --out whole") == 0
    steps = []

    def stopping(*_: object) -> None:
        steps.append(1)
        if len(steps) == before:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(stopping)
    try:
        assert tether(f"{line} --out cut") == 75
    finally:
        hook.remove()
    assert tether("resume cut") == 0
    assert numbers(Path("cut")) == numbers(Path("whole"))
