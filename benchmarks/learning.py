"""What the built-in tasks teach the embedded model: a short fine-tuning on the format, then reinforcement learning.

    python -m benchmarks.learning [guess] [calculator] [arithmetic] [--out DIR] [--figure FILE.png]

Runs tether's own commands, the lines of :data:`TASKS`, and measures each model on held-out rows before and after; the
figure has the curves of training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tether.cli import main as tether
from tether.environments.guess import fewest_guesses
from tether.report.plots import COLOURS, Panel, Series, figure


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. ``{out}`` is its directory."""

    sft: str
    rl: str
    evaluate: str
    """``tether eval`` of what ``--model`` names."""
    metric: str
    """What the curve shows."""
    title: str
    label: str
    best: float | None = None
    """What is the best that can be had, where that is known."""


EPISODES = "--env guess --max-turns 8 --turn-tokens 1 --max-new-tokens 24"
CALCULATOR = "--env calculator --stop = --max-turns 4 --max-new-tokens 64"
ANSWER = "--reward exact_answer --max-new-tokens 32"
HELD_OUT = "arithmetic:count=200,seed=1"
TASKS = {
    "guess": Task(
        sft="sft --model base --data guess:count=2000 --epochs 1 --batch-size 32 --learning-rate 5e-4",
        rl=f"ppo --model {{out}}/sft/model --prompts guess:count=256 {EPISODES} --discount turn --kl-coef 0 "
        "--steps 120 --prompts-per-step 128 --minibatches 4 --learning-rate 2e-4 --warmup-steps 5",
        evaluate=f"eval --prompts guess:count=400,seed=1 {EPISODES}",
        metric="rewards/guess/guesses/mean",
        title="Guess a number from 1 to 8",
        label="guesses",
        best=fewest_guesses(8),
    ),
    "calculator": Task(
        sft="sft --model base --data problems:count=3000,right=40 --epochs 2 --batch-size 16 --learning-rate 1e-3",
        rl=f"grpo --model {{out}}/sft/model --prompts problems:count=3000 {CALCULATOR} --kl-coef 0 --steps 60 "
        "--prompts-per-step 32 --group-size 8 --minibatches 2 --learning-rate 2e-4 --warmup-steps 5",
        evaluate=f"eval --prompts problems:count=200,seed=1 {CALCULATOR}",
        metric="rewards/calculator/mean",
        title="Word problems with a calculator",
        label="right",
        best=1.0,
    ),
    "arithmetic": Task(
        sft=f"sft --model base --data arithmetic:count=2000 --eval-data {HELD_OUT} --on-bad-rows skip --epochs 2.1 "
        "--batch-size 16 --learning-rate 1e-3",
        rl=f"grpo --model {{out}}/sft/model --prompts arithmetic:count=2000 --eval-prompts {HELD_OUT} {ANSWER} "
        "--on-bad-rows skip --group-size 8 --prompts-per-step 64 --minibatches 4 --steps 120 --learning-rate 2e-4 "
        "--warmup-steps 5 --kl-coef 0",
        evaluate=f"eval --prompts {HELD_OUT} {ANSWER} --group-size 4",
        metric="rewards/exact_answer/mean",
        title="Sums up to 99 + 99",
        label="right",
        best=1.0,
    ),
}


def run(line: str) -> str:
    """What a command prints. Raises :class:`SystemExit` where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = tether(shlex.split(line))
    if code:
        raise SystemExit(f"tether {line}: exit code {code}")
    return said.getvalue()


def learn(task: Task, out: Path) -> Series:
    """Run the task in ``out``, print what came of it, and give the curve of training."""
    begun = time.monotonic()
    run(f"{task.sft} --out {out}/sft --quiet")
    before = json.loads(run(f"{task.evaluate} --model {out}/sft/model"))["rewards"]
    between = time.monotonic()
    run(f"{task.rl.format(out=out)} --out {out}/rl --rollouts-every 0 --quiet")
    ended = time.monotonic()
    after = json.loads(run(f"{task.evaluate} --model {out}/rl/model"))["rewards"]
    print(f"{task.title}: fine-tuned in {between - begun:.0f} s, trained in {ended - between:.0f} s")
    print("  held out, before:", {name: round(value, 3) for name, value in before.items()})
    print(
        "  held out, after: ", {name: round(value, 3) for name, value in after.items()}, "best:", task.best, flush=True
    )
    rows = [json.loads(line) for line in (out / "rl/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Series(
        label=task.label, x=[row["step"] for row in rows], y=[row[task.metric] for row in rows], colour=COLOURS[0]
    )


def panel(task: Task, curve: Series) -> Panel:
    best = [task.best] if task.best is not None else []
    lines = [Series(label="best", x=[1.0, curve.x[-1]], y=best * 2, colour=COLOURS[1], dashed=True)] if best else []
    return Panel(title=task.title, x_label="step", y_label=task.label, series=[curve, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--out", type=Path, help="where the runs go; a temporary directory unless given")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        panels = [panel(TASKS[name], learn(TASKS[name], out / name)) for name in args.tasks]
    if args.figure:
        figure(panels, columns=len(panels), width=3.6 * len(panels)).savefig(args.figure, dpi=130)


if __name__ == "__main__":
    main()
