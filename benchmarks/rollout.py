"""Generation: tether's engine against transformers.

    python -m benchmarks.rollout [--only short|long]

short: prompts of about 55 tokens. long: prompts of 1,024 tokens. G = 8, all completions of one forced length, sampled
at temperature 1 from the whole distribution. Peers: ``generate`` as TRL calls it, and continuous batching.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import flops
from benchmarks.duel import Result, contest, ours, parser, peer, report, shape_of
from benchmarks.worker import Spec
from benchmarks.workload import around, write_models, write_prompts

GROUP_SIZE = 8


def run(name: str, *, device: str, shape: flops.Shape, rounds: int, patience: float) -> Result:
    new_tokens = 512 if device == "cuda" else 64
    count = 64 if device == "cuda" else {"short": 8, "long": 4}[name]
    lengths = around(55, count) if name == "short" else [1024] * count
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder:
        policy, reward, tokenizer = write_models(Path(folder), shape)
        spec = Spec(
            model=policy,
            reward_model=reward,
            prompts=write_prompts(Path(folder) / "prompts.jsonl", tokenizer, lengths),
            device=device,
            group_size=GROUP_SIZE,
            prompts_per_step=count,
            max_new_tokens=new_tokens,
        )
        work = flops.rollout(shape, lengths, group_size=GROUP_SIZE, new_tokens=new_tokens, bytes_per_number=4)
        title = f"rollout, {count} prompts of {sum(lengths) // count} tokens x {GROUP_SIZE}, {new_tokens} new tokens"
        contenders = [
            ours("rollout"),
            peer("generate", "peer_generate", "generate", trl="1.16"),
            peer("generate_batch", "peer_generate", "generate_batch", trl="1.16"),
        ]
        return contest(title, contenders, spec, work, rounds=rounds, patience=patience)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=("short", "long"))
    args = options.parse_args()
    names = [args.only] if args.only else ["short", "long"]
    report(
        [
            run(name, device=args.device, shape=shape_of(args), rounds=args.rounds, patience=args.patience)
            for name in names
        ],
        args,
    )


if __name__ == "__main__":
    main()
