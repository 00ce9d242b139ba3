"""How many tokens of a mixture get other experts in training than in sampling, by precision.

    python -m benchmarks.expert_gap [--steps 3]

A Qwen3 mixture with random weights: 27 million parameters, 8 layers, 4 of 32 experts. GRPO steps of 8 prompts x 8
completions of 48 tokens; prints the means over the steps of ``sampling/expert_gap`` and ``sampling/logprob_gap_mean``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tether.cli import main as tether
from tiny import VOCAB, byte_tokenizer

CASES = {
    "float32": "--dtype float32 --matmul-dtype float32",
    "products of training in bfloat16": "--dtype float32 --matmul-dtype bfloat16",
    "bfloat16": "--dtype bfloat16",
}
FIGURES = ("sampling/expert_gap", "sampling/logprob_gap_mean")


def write_problem() -> None:
    """A model and prompts, in the present directory."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, num_experts=32, num_experts_per_tok=4, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    rows = ({"prompt": f"A sentence about the number {i} that goes on for a while"} for i in range(32))
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_problem()
        for number, (name, options) in enumerate(CASES.items()):
            line = (
                f"grpo --model model --prompts prompts.jsonl --reward length:20 --steps {args.steps} "
                f"--prompts-per-step 8 --group-size 8 --max-new-tokens 48 {options} --quiet --out {number}"
            )
            if (code := tether(line.split())) != 0:
                raise SystemExit(code)
            rows = [json.loads(row) for row in Path(str(number), "metrics.jsonl").read_text().splitlines()]
            means = {figure: sum(row[figure] for row in rows) / len(rows) for figure in FIGURES}
            print(f"{name:34} " + "  ".join(f"{figure} {mean:.2g}" for figure, mean in means.items()), flush=True)


if __name__ == "__main__":
    main()
