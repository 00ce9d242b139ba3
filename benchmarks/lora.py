"""Adapters against all weights, at Qwen2.5-0.5B's shape with random weights in bfloat16: memory and decoding.

    python -m benchmarks.lora [--shape 0.5b] [--steps 2] [--rounds 5]

Memory: each side is a fresh process that runs ``tether grpo``, 4 prompts of 64 tokens with 4 completions of 64 tokens
each. The peak is that of the process in its last step, Python and torch included. Decoding: the same completions with
an adapter of rank 16 and with it off, in turn; also of the embedded model in float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.duel import ROOT
from benchmarks.flops import SHAPES, Shape
from benchmarks.workload import config_of, write_prompts
from tether.generation.engine import Engine
from tether.models.adapters import Lora, adapter_off, add_adapter
from tether.models.loading import BASE, load_policy, resolve
from tether.models.trainable import trainable
from tether.runtime.directory import read_metrics
from tether.types import Prompt, Sampling, make_requests

SIDES = {
    "all weights": "",
    "lora, r = 16, all linear layers": "--lora-rank 16",
    "lora, r = 16, attention": "--lora-rank 16 --lora-targets q_proj,k_proj,v_proj,o_proj",
}
TASK = (
    "--dtype bfloat16 --prompts-per-step 4 --group-size 4 --max-new-tokens 64 --min-new-tokens 64 --save-every 0 "
    "--keep-checkpoints --rollouts-every 0 --reward length:40 --quiet"
)


@dataclass(frozen=True)
class Measured:
    peak_gib: float
    step_seconds: float
    checkpoint_mib: float
    model_mib: float


def mebibytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 2**20


def write_model(folder: Path, shape: Shape) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE), model_max_length=shape.context, trust_remote_code=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(shape, tokenizer), dtype=torch.bfloat16).save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    write_prompts(folder / "prompts.jsonl", tokenizer, [64] * 8)


def measure(folder: Path, options: str, steps: int) -> Measured:
    line = f"grpo --model m --prompts prompts.jsonl --out run --overwrite --steps {steps} {TASK} {options}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-m", "tether", *line.split()], cwd=folder, env=environment, check=True)
    last, run = read_metrics(folder / "run")[-1], folder / "run"
    newest = max((run / "checkpoints").iterdir())
    return Measured(last["memory/peak_gib"], last["step_time"], mebibytes(newest), mebibytes(run / "model"))


def decoding(source: str, dtype: torch.dtype, *, rows: int, rounds: int) -> float:
    """Seconds to sample ``rows`` completions of 64 tokens with an adapter over those without: the median ratio."""
    model, tokenizer = load_policy(source, dtype=dtype)
    add_adapter(model, Lora(lora_rank=16), seed=0)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(1e-3 * torch.randn_like(weight))
    engine, ratios = Engine(model, tokenizer), []
    requests = make_requests([Prompt(ids=tuple(range(3, 20)), text="")], group_size=rows, seed=0)
    sampling = Sampling(max_new_tokens=64, min_new_tokens=64)

    def seconds() -> float:
        start = time.perf_counter()
        engine.generate(requests, sampling=sampling)
        return time.perf_counter() - start

    for _ in range(rounds + 1):
        with adapter_off(model):
            plain = seconds()
        ratios.append(seconds() / plain)
    return statistics.median(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.5b")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| trained | peak GiB | of all weights' | step s | checkpoint MiB | model/ MiB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, "-c", WRITE, str(folder), args.shape], cwd=ROOT, check=True)
        first: float | None = None
        for name, options in SIDES.items():
            found = measure(folder, options, args.steps)
            first = first or found.peak_gib
            print(
                f"| {name} | {found.peak_gib:.2f} | {found.peak_gib / first:.3f} | {found.step_seconds:.1f} | "
                f"{found.checkpoint_mib:.1f} | {found.model_mib:.1f} |",
                flush=True,
            )
        large = decoding(str(folder / "m"), torch.bfloat16, rows=16, rounds=args.rounds)
    small = decoding(BASE, torch.float32, rows=64, rounds=args.rounds)
    print(f"decoding with an adapter: {large:.2f} times as long at this shape, {small:.2f} with the embedded model")


WRITE = (
    "import sys; from pathlib import Path; from benchmarks.flops import SHAPES; "
    "from benchmarks.lora import write_model; write_model(Path(sys.argv[1]), SHAPES[sys.argv[2]])"
)
"""In a process of its own: the peak of a process is inherited by those that it starts."""


if __name__ == "__main__":
    main()
