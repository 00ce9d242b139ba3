"""Planted failures: whether ``not_learning`` names the right cause within 20 steps, and nothing on healthy runs.

    python -m benchmarks.failures [FAILURE ...] [--seeds 5]

GRPO (for the critic PPO) on the embedded model with the sentiment reward, with one thing wrong each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tether

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 21


def never(completions: list[str], **_: Any) -> list[float]:
    return [float("<answer>" in text) for text in completions]


def always(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) > 0) for text in completions]


def of_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [len(prompt) / 100 for prompt, _ in zip(prompts, completions, strict=True)]


def ends(completions: list[str], **_: Any) -> list[float]:
    """Paid for a signature that comes at the end, which the limit cuts off."""
    return [float(text.rstrip().endswith("Yours, Jane")) for text in completions]


@dataclass(frozen=True)
class Failure:
    """What is wrong, and words of the message that names it."""

    named: str
    reward: Any = "sentiment"
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = tether.grpo.run


CUT = "cut at the length limit"
FAILURES = {
    "healthy": Failure(""),
    "never solved": Failure("never met", never, {"max_new_tokens": 48, "stop": (".",)}),
    "always solved": Failure("or always", always, {"max_new_tokens": 48, "stop": (".",)}),
    "prompt alone": Failure("depends on the prompt", of_prompt),
    "cut short": Failure(CUT, ends, {"max_new_tokens": 8}),
    "no stop token": Failure(CUT, ends, {"max_new_tokens": 24, "stop": ("</answer>",)}),
    "learning rate": Failure("hardly moved", "sentiment", {"learning_rate": 1e-9}),
    "strong KL": Failure("KL penalty", "sentiment", {"kl_coef": 100.0}),
    "no entropy": Failure("entropy", "sentiment", {"temperature": 0.02}),
    "clip": Failure("hardly moved", "sentiment", {"max_grad_norm": 1e-9, "adam_eps": 1.0}),
    "scale": Failure("scale is too small", "sentiment=1e-9", {"advantage_scale": "none"}),
}


def alarm_of(failure: Failure, seed: int, out: Path) -> str:
    """The message of ``not_learning``; "" where it said nothing."""
    options = {"max_new_tokens": 32, "kl_coef": 0.01, "learning_rate": 5e-4} | failure.options
    failure.run(
        model="base",
        prompts=str(EXAMPLES / "prompts.jsonl"),
        rewards=failure.reward,
        group_size=8,
        prompts_per_step=8,
        steps=STEPS,
        seed=seed,
        out=str(out),
        quiet=True,
        overwrite=True,
        **options,
    )
    alarms = json.loads((out / "summary.json").read_text())["alarms"]
    return next((alarm["message"] for alarm in alarms if alarm["monitor"] == "not_learning"), "")


def tried(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int, int]]:
    """Name, how often the right cause was named (of the healthy, how often anything), of how many."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            failure, count = FAILURES[name], 0
            for seed in seeds:
                said = alarm_of(failure, seed, Path(temporary) / "run")
                count += bool(said) and failure.named in said
                print(f"{name} {seed}: {said or 'nothing named'}", flush=True)
            found.append((name, count, len(seeds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("failures", nargs="*", default=list(FAILURES), metavar="FAILURE", help=", ".join(FAILURES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=300)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print("\n| failure | named |\n|---|---|")
    for name, count, total in tried(args.failures, seeds):
        print(f"| {name} | {count}/{total} |")


if __name__ == "__main__":
    main()
