"""The command line per training command, for the files of :func:`commandline.workspace`.

They need ``--model`` and ``--out``. A flag that follows takes the place of the same flag in a line.
"""

from __future__ import annotations

SAMPLED = "--prompts p.jsonl --reward r.py:fn"
STEPS = "--prompts-per-step 2 --group-size 2 --minibatches 2 --epochs-per-step 2 --max-new-tokens 5 --steps 4"
LINES = {
    "sft": "sft --data texts.jsonl --batch-size 2 --epochs 4",
    "reward": "reward --pairs pairs.jsonl --batch-size 6 --epochs 3 --evals-per-epoch 1",
    "dpo": "dpo --pairs pairs.jsonl --batch-size 6 --epochs 3",
    "rejection-sampling": f"rejection-sampling {SAMPLED} --group-size 3 --rounds 3 --batch-size 2 --max-new-tokens 5",
    "ppo": f"ppo {SAMPLED} {STEPS}",
    "grpo": f"grpo {SAMPLED} {STEPS}",
}
"""Several steps, each of several optimizer steps: what is needed to stop in the middle of one. Below a second each."""

HELD_OUT = "--eval-prompts held_prompts.jsonl"
EVALUATED = f"{HELD_OUT} --eval-every 2 --eval-group-size 2 --eval-reward length:3"
LONG_STEPS = "--max-new-tokens 8 --prompts-per-step 4 --keep-checkpoints"
STRUCK = {
    "sft": f"{LINES['sft']} --eval-data held_texts.jsonl --epochs 8",
    "reward": f"{LINES['reward']} --batch-size 4 --epochs 7 --evals-per-epoch 2 --patience 0",
    "dpo": f"{LINES['dpo']} {EVALUATED} --batch-size 4 --epochs 4 --evals-per-epoch 2 --max-new-tokens 4",
    "rejection-sampling": f"{LINES['rejection-sampling']} {EVALUATED} --max-new-tokens 8 --group-size 4 --top-k 2 "
    "--epochs 2 --keep-checkpoints",
    "ppo": f"{LINES['ppo']} {HELD_OUT} {LONG_STEPS} --group-size 1 --steps 16 --kl-coef 0.1 --adaptive-kl-target 0.5 "
    "--adaptive-kl-horizon 50 --target-kl 0.05",
    "grpo": f"{LINES['grpo']} {EVALUATED} {LONG_STEPS} --group-size 3 --steps 12 --dynamic-sampling 1 "
    "--keep-best=-eval/kl --patience 4",
}
"""A second or three each, with everything that a state may hold: epochs, evaluations, the best weights so far, rounds,
an adaptive KL coefficient, passes that stop early, dynamic sampling, early stopping. Some keep their checkpoints."""

# The beginnings of short runs, of the model at {tiny} into out/.
GRPO = "grpo --model {tiny} --max-new-tokens 4 --steps 2 --prompts-per-step 2 --group-size 2 --out out"
TASK = f"{GRPO} --prompts p.jsonl --reward r.py:fn"
PPO = "ppo --model {tiny} --max-new-tokens 4 --steps 2 --prompts-per-step 2 --out out --prompts p.jsonl"
RS = "rejection-sampling --model {tiny} --prompts p.jsonl --max-new-tokens 4 --out out"
SFT = "sft --model {tiny} --out out --data"
REWARD = "reward --model {tiny} --out out --pairs"
