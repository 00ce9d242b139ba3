"""The memory that runs are estimated to take when they begin, against the peak that they reach.

    python -m benchmarks.memory_estimate [--only NAME]

Each configuration is a fresh process on the CPU that runs ``tether``: three steps with completions or rows of one
length, on random weights in the shape of Qwen2.5-0.5B with fewer layers, or the embedded model. Both figures are those
that the run prints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.duel import ROOT
from benchmarks.flops import SHAPES
from benchmarks.workload import config_of, write_prompts
from tether.models.loading import BASE, resolve

LAYERS, TOKENS = 6, 64
TASK = "--prompts prompts.jsonl --reward length:40 --rollouts-every 0 --max-new-tokens 64 --min-new-tokens 64 --steps 3"
GRPO = f"grpo --model m {TASK} --prompts-per-step 4 --group-size 4"
ROWS = "--batch-size 16 --epochs 0.375"
CONFIGURATIONS = {
    "sft, float32": f"sft --model m --data rows.jsonl {ROWS}",
    "reward model, float32": f"reward --model m --pairs pairs.jsonl {ROWS}",
    "dpo, bfloat16": f"dpo --model m --pairs pairs.jsonl {ROWS} --dtype bfloat16",
    "ppo, bfloat16": f"ppo --model m {TASK} --prompts-per-step 16 --dtype bfloat16",
    "grpo, float32": GRPO,
    "grpo, bfloat16, checkpointed activations": f"{GRPO} --dtype bfloat16 --checkpoint-activations",
    "grpo, bfloat16, LoRA": f"{GRPO} --prompts-per-step 8 --group-size 8 --dtype bfloat16 --lora-rank 16",
    "grpo, embedded model": f"{GRPO} --model base --prompts-per-step 16 --group-size 8",
}
EXPECTED = re.compile(r"^memory: ([\d.]+) GiB expected at the peak, in the (\w+) \((.*)\)", re.MULTILINE)
FOUND = re.compile(r"memory ([\d.]+) GiB at the peak")


def write(folder: Path) -> None:
    """The model and the data."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE), model_max_length=1024, trust_remote_code=False)
    torch.manual_seed(0)
    shape = replace(SHAPES["0.5b"], layers=LAYERS)
    model = AutoModelForCausalLM.from_config(config_of(shape, tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    write_prompts(folder / "prompts.jsonl", tokenizer, [TOKENS] * 128)
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    sides = {"chosen": " the" * TOKENS, "rejected": " a" * TOKENS}
    pairs = [{**json.loads(line), **sides} for line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def measure(folder: Path, line: str) -> tuple[float, float, str, str]:
    """Expected and measured peak in GiB, the phase, and the parts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "tether", *line.split(), "--out", "run", "--overwrite", "--save-every", "0"]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stderr=subprocess.PIPE, text=True)
    expected, found = EXPECTED.search(done.stderr), FOUND.search(done.stderr)
    if not expected or not found:
        raise SystemExit(f"no figures in what the run said:\n{done.stderr}")
    return float(expected[1]), float(found[1]), expected[2], expected[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose names hold this")
    args = parser.parse_args()
    print("| run | peak GiB | expected | error | parts |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        for name, line in CONFIGURATIONS.items():
            if args.only in name:
                expected, found, phase, parts = measure(folder, line)
                print(
                    f"| {name} | {found:.2f} | {expected:.2f} | {expected / found - 1:+.0%} | {phase}: {parts} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
