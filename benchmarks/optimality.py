"""Which optimum each algorithm reaches, through the commands only, on the enumerable problem of the tests.

    python -m benchmarks.optimality [--steps 300]

All completions of two tokens of a tiny Llama over eight tokens, rewards within +-0.5, beta 0.5. Prints the total
variation between the trained policy and the optimum of E[r] - beta KL(pi || ref) (reverse) and of
E[r] - beta KL(ref || pi) (forward). Each loss must reach its own optimum and not the other.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from enumerable import Space, total_variation, write_problem
from tether.cli import main as tether
from tether.models.loading import load_policy

BETA, SEED = 0.5, 1
CASES = {
    "ppo": "ppo",
    "grpo k2": "grpo --advantage-scale none --kl-estimator k2",
    "grpo k3_corrected": "grpo --advantage-scale none --kl-estimator k3_corrected",
    "grpo k3": "grpo --advantage-scale none --kl-estimator k3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        space = Space.of(8, 2, seed=SEED)
        prompt = write_problem(Path(), space, seed=SEED)

        @torch.no_grad()
        def logprobs(model: str) -> torch.Tensor:
            return space.logprobs(load_policy(model)[0], prompt=prompt)

        reference = logprobs("model")
        reverse, forward = space.reverse_optimum(reference, BETA), space.forward_optimum(reference, BETA)
        print(f"between the two optima {total_variation(reverse, forward):.4f}", flush=True)
        for number, (name, command) in enumerate(CASES.items()):
            start = time.monotonic()
            out = f"out{number}"
            line = (
                f"{command} --model model --prompts prompts.jsonl --reward reward.py:fn --kl-coef {BETA} "
                f"--steps {args.steps} --prompts-per-step 2 --group-size 128 --max-new-tokens 2 --temperature 1 "
                f"--learning-rate 1e-3 --seed 0 --rollouts-every 0 --quiet --out {out}"
            )
            if (code := tether(line.split())) != 0:
                sys.exit(code)
            found = logprobs(f"{out}/model").exp()
            print(
                f"{name:<18} to reverse {total_variation(found, reverse):.4f}, "
                f"to forward {total_variation(found, forward):.4f}  ({time.monotonic() - start:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
