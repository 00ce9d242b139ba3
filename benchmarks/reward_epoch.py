"""An epoch of reward-model training: tether against TRL's RewardTrainer.

    python -m benchmarks.reward_epoch --data DIR [--pairs 256]

The first pairs of the HH helpful-base test set in DIR whose sides have at most 512 tokens; 32 pairs per optimizer step;
float32; the same weights on both sides, head included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import flops
from benchmarks.duel import contest, ours, parser, peer, report, shape_of
from benchmarks.worker import Spec
from benchmarks.workload import write_models, write_pairs, write_prompts

PAIRS_PER_STEP, MAX_LENGTH = 32, 512
PEER_PAIRS = {"cpu": 4, "cuda": 16}
"""Pairs per batch of TRL. It pads a batch to its longest side; of 4, 8 and 32, 4 was the fastest on a CPU."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--pairs", type=int, default=256)
    args = options.parse_args()
    shape = shape_of(args)
    with tempfile.TemporaryDirectory(prefix="reward-") as folder:
        policy, reward, tokenizer = write_models(Path(folder), shape)
        pairs, shared, sides = write_pairs(
            Path(folder) / "pairs.jsonl", args.data, tokenizer, count=args.pairs, max_length=MAX_LENGTH
        )
        spec = Spec(
            model=policy,
            reward_model=reward,
            prompts=write_prompts(Path(folder) / "prompts.jsonl", tokenizer, []),
            pairs=pairs,
            device=args.device,
            pairs_per_step=PAIRS_PER_STEP,
            steps_per_turn=args.pairs // PAIRS_PER_STEP,
            max_length=MAX_LENGTH,
            peer_rows=PEER_PAIRS[args.device],
            tokens_at_once=32768 if args.device == "cuda" else 8192,
        )
        title = f"reward model, {args.pairs} pairs of up to {MAX_LENGTH} tokens, {PAIRS_PER_STEP} per step"
        contenders = [
            ours("reward_epoch"),
            ours("reward_epoch", defaults=True),
            peer("TRL 1.16", "peer_trl", "reward_epoch", trl="1.16"),
        ]
        work = flops.reward_epoch(shape, shared, sides)
        report([contest(title, contenders, spec, work, rounds=args.rounds, patience=args.patience)], args)


if __name__ == "__main__":
    main()
