"""The cost of a GRPO step as the group and the number of completions grow; draws docs/cost.png.

    python -m benchmarks.cost [--out docs/cost.png]

First the prompts are fixed and G doubles: a prompt's share of the work must not grow, so each doubling must cost less
than twice as much. Then G is fixed and the prompts increase: the step time must be linear in the completions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.duel import ROOT, parser, shape_of
from benchmarks.flops import Shape
from benchmarks.ours import grpo_step, synchronise_with
from benchmarks.worker import Spec
from benchmarks.workload import write_models, write_prompts
from tether.report.plots import COLOURS, Panel, Series, figure

GROUPS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Line:
    """y = base + slope * x, and the share of the variance of y that it explains."""

    base: float
    slope: float
    r_squared: float

    @staticmethod
    def through(x: Sequence[float], y: Sequence[float]) -> Line:
        slope, base = statistics.linear_regression(x, y)
        return Line(base, slope, statistics.correlation(x, y) ** 2)


def timed(spec: Spec, *, rounds: int) -> tuple[float, float]:
    """Median seconds of a step and of its training pass (the update), after one warm-up step."""
    step, synchronise = grpo_step(spec), synchronise_with(spec.device)
    whole, update = [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        figures = step() or {}
        synchronise()
        if number:
            whole.append(time.perf_counter() - start)
            update.append(figures["time/update"])
    return statistics.median(whole), statistics.median(update)


def sweep(
    cases: Sequence[tuple[int, int]], prompt: int, new_tokens: int, shape: Shape, args: argparse.Namespace
) -> list[tuple[float, float]]:
    """Step and update seconds for each (prompts, group size), prompts of ``prompt`` tokens."""
    found = []
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        policy, reward, tokenizer = write_models(Path(folder), shape)
        for prompts, group_size in cases:
            spec = Spec(
                model=policy,
                reward_model=reward,
                prompts=write_prompts(Path(folder) / "prompts.jsonl", tokenizer, [prompt] * prompts),
                device=args.device,
                group_size=group_size,
                prompts_per_step=prompts,
                max_new_tokens=new_tokens,
                kl_coef=0.04,
                tokens_at_once=32768 if args.device == "cuda" else 8192,
            )
            found.append(timed(spec, rounds=args.rounds))
            size = f"{prompts} prompts of {prompt} tokens, G {group_size}"
            print(f"{size}: step {found[-1][0]:.2f} s, update {found[-1][1]:.2f} s", flush=True)
    return found


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(rounds=3)
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "cost.png")
    args = options.parse_args()
    shape, cuda = shape_of(args), args.device == "cuda"
    few, long, new_tokens = (8, 1024, 512) if cuda else (2, 512, 64)
    counts = (4, 8, 16, 32, 64) if cuda else (1, 2, 4, 8, 16)
    grown = sweep([(few, g) for g in GROUPS], long, new_tokens, shape, args)
    more = sweep([(p, 8) for p in counts], 55, new_tokens, shape, args)
    panels, figures = [], []
    for title, x_label, x, seconds in (
        (f"{few} prompts of {long} tokens, G grows", "completions per prompt, G", list(GROUPS), grown),
        ("G = 8, prompts of 55 tokens, more of them", "completions per step", [8 * p for p in counts], more),
    ):
        series = []
        for k, name in enumerate(("step", "training pass")):
            y = [pair[k] for pair in seconds]
            line = Line.through(x, y)
            doublings = [b / a for a, b in itertools.pairwise(y)]
            print(f"{title}: {name} = {line.base:.3f} + {line.slope:.4f} x s, R2 {line.r_squared:.4f}")
            print("    each doubling costs " + ", ".join(f"{d:.2f}" for d in doublings) + " times as much")
            fit = [line.base + line.slope * v for v in x]
            series.append(Series(label=f"{name}, measured", x=x, y=y, colour=COLOURS[k], points=True))
            series.append(Series(label=f"{name}, line", x=x, y=fit, colour=COLOURS[k], dashed=True))
            figures.append({"sweep": title, "of": name, "x": x, "seconds": y, "line": vars(line)})
        panels.append(Panel(title=title, x_label=x_label, y_label="seconds", series=series))
    figure(panels).savefig(args.out, dpi=150)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
