"""A loss and an optimizer of one's own in GRPO: CISPO with RMSprop. Under 20 seconds on two CPU cores.

python examples/own_loss.py [STEPS]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

import tether
from rewards import speech

HERE = Path(__file__).parent
HIGH = 0.28


def cispo(inputs: tether.LossInputs) -> tether.LossTerms:
    """-clip(rho, max 1 + HIGH) A log pi, with rho = pi / pi_old held constant (arXiv 2506.13585).

    Where PPO's clip drops the gradient of a token, this bounds its weight. Everything is [B, T]: a loss per token, and
    figures whose mean is a metric. The KL term of the configuration is added to it.
    """
    ratio = (inputs.logp - inputs.old_logp).detach().exp()
    loss = -ratio.clamp(max=1 + HIGH) * inputs.advantages * inputs.logp
    return tether.LossTerms(loss=loss, figures={"clip_ratio/high_mean": ratio > 1 + HIGH})


def main(steps: int = 8) -> None:
    model, tokenizer = tether.load_policy("base")
    reference = tether.reference_of(model)
    config = tether.grpo.Config(
        kl_coef=0.1, epochs_per_step=2, sampling=tether.Sampling(max_new_tokens=20, temperature=0.8)
    )
    prompts = tether.load_prompts(
        str(HERE / "prompts.jsonl"), tokenizer, context=tether.context_length(model), max_new_tokens=20
    )
    engine = tether.Engine(model, tokenizer)
    score = tether.WeightedSum(((tether.FunctionReward("speech", speech), 1.0),))
    state = tether.grpo.State.create(
        model,
        config,
        reference=reference,
        prompts=len(prompts),
        total_steps=steps,
        seed=0,
        optimizer=partial(torch.optim.RMSprop, lr=5e-5),  # lr is the peak of the configuration's schedule
    )
    while state.step < steps:
        with state.cursor.rollback_on_error():
            batch = state.cursor.take(prompts, len(prompts))
            result = tether.grpo.step(state, batch, generator=engine, scorer=score, config=config, loss=cispo)
        row = result.metrics
        clipped = row["clip_ratio/high_mean"]
        print(f"step {state.step:2}  reward {row['reward']:.2f}  kl {row['kl']:.2f}  clipped {clipped:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
