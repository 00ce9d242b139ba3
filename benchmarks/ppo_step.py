"""A PPO update: tether against TRL's last PPOTrainer (1.12).

    python -m benchmarks.ppo_step

64 distinct prompts of about 55 tokens, 64 new tokens each (on a GPU 512 prompts and 512 new tokens), one epoch of one
optimizer step; reference, value and reward models of their own, of the policy's size; float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import flops
from benchmarks.duel import contest, ours, parser, peer, report, shape_of
from benchmarks.worker import Spec
from benchmarks.workload import around, write_models, write_prompts


def main() -> None:
    args = parser(__doc__).parse_args()
    shape, cuda = shape_of(args), args.device == "cuda"
    count, new_tokens = (512, 512) if cuda else (64, 64)
    lengths = around(55, count)
    with tempfile.TemporaryDirectory(prefix="ppo-") as folder:
        policy, reward, tokenizer = write_models(Path(folder), shape)
        spec = Spec(
            model=policy,
            reward_model=reward,
            prompts=write_prompts(Path(folder) / "prompts.jsonl", tokenizer, lengths),
            device=args.device,
            prompts_per_step=count,
            max_new_tokens=new_tokens,
            kl_coef=0.05,
            peer_rows=32 if cuda else 64,
            tokens_at_once=32768 if cuda else 8192,
        )
        work = flops.ppo_step(shape, lengths, new_tokens=new_tokens, bytes_per_number=4)
        title = f"PPO step, {count} prompts, {new_tokens} new tokens"
        contenders = [
            ours("ppo_step"),
            ours("ppo_step", defaults=True),
            peer("TRL 1.12", "peer_trl", "ppo_step", trl="1.12"),
        ]
        report([contest(title, contenders, spec, work, rounds=args.rounds, patience=args.patience)], args)


if __name__ == "__main__":
    main()
