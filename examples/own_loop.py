"""GRPO in a custom loop: load, generate, score with a Python function, step. Under 20 seconds on two CPU cores.

python examples/own_loop.py [STEPS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import tether
from rewards import speech

HERE = Path(__file__).parent


def main(steps: int = 8) -> None:
    sampling = tether.Sampling(max_new_tokens=20, temperature=0.8)
    config = tether.grpo.Config(
        group_size=8, kl_coef=0.1, sampling=sampling, optim=tether.Optim(learning_rate=3e-4, lr_schedule="constant")
    )
    model, tokenizer = tether.load_policy("base")
    reference = tether.reference_of(model)  # a frozen copy, made before the model is trained
    prompts = tether.load_prompts(
        str(HERE / "prompts.jsonl"), tokenizer, context=tether.context_length(model), max_new_tokens=20
    )
    engine = tether.Engine(model, tokenizer)
    score = tether.WeightedSum(((tether.FunctionReward("speech", speech), 1.0),))
    state = tether.grpo.State.create(
        model, config, reference=reference, prompts=len(prompts), total_steps=steps, seed=0
    )

    def sample() -> str:
        group = engine.generate(tether.make_requests(prompts[:1], group_size=1, seed=0), sampling=sampling)[0]
        return group.prompt.text + group.completions[0].text

    before = sample()
    while state.step < steps:
        # after an interrupt the loop can run again: the step then has the prompts that it had
        with state.cursor.rollback_on_error():
            batch = state.cursor.take(prompts, len(prompts))
            result = tether.grpo.step(state, batch, generator=engine, scorer=score, config=config)
        row = result.metrics
        print(f"step {state.step:2}  reward {row['reward']:.2f}  kl {row['kl']:.2f}  loss {row['loss']:+.3f}")
    print(f"before: {before}\nafter:  {sample()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
