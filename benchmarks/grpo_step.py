"""A whole GRPO step: tether against TRL's GRPOTrainer (without vLLM).

    python -m benchmarks.grpo_step

8 prompts of about 55 tokens x G = 8 x 64 new tokens (on a GPU 64 x 8 x 512), the reference model on (KL coefficient
0.04), one epoch, one optimizer step, float32, a reward function that costs nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import flops
from benchmarks.duel import contest, ours, parser, peer, report, shape_of
from benchmarks.worker import Spec
from benchmarks.workload import around, write_models, write_prompts

GROUP_SIZE = 8


def main() -> None:
    args = parser(__doc__).parse_args()
    shape, cuda = shape_of(args), args.device == "cuda"
    count, new_tokens = (64, 512) if cuda else (8, 64)
    lengths = around(55, count)
    with tempfile.TemporaryDirectory(prefix="grpo-") as folder:
        policy, reward, tokenizer = write_models(Path(folder), shape)
        spec = Spec(
            model=policy,
            reward_model=reward,
            prompts=write_prompts(Path(folder) / "prompts.jsonl", tokenizer, lengths),
            device=args.device,
            group_size=GROUP_SIZE,
            prompts_per_step=count,
            max_new_tokens=new_tokens,
            kl_coef=0.04,
            peer_rows=32 if cuda else 64,  # on a CPU, TRL is no faster with 16 at a time
            tokens_at_once=32768 if cuda else 8192,
        )
        work = flops.grpo_step(shape, lengths, group_size=GROUP_SIZE, new_tokens=new_tokens, bytes_per_number=4)
        title = f"GRPO step, {count} prompts x {GROUP_SIZE} x {new_tokens} new tokens"
        contenders = [
            ours("grpo_step"),
            ours("grpo_step", defaults=True),
            peer("TRL 1.16", "peer_trl", "grpo_step", trl="1.16"),
        ]
        report([contest(title, contenders, spec, work, rounds=args.rounds, patience=args.patience)], args)


if __name__ == "__main__":
    main()
