"""The learning rate that nobody gave, and weights in less than full precision."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from enumerable import tiny_llama
from helpers import FunctionScorer
from tether.algorithms import grpo, ppo, sft
from tether.algorithms.optimise import Optim, adamw, masters, optimiser_step, peak_learning_rate
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.runtime.state import Snapshot
from tether.types import Demonstration, Prompt, Sampling

DATA = [
    Demonstration(prompt_ids=(0, 3), completion_ids=(4, 5, 1)),
    Demonstration(prompt_ids=(0,), completion_ids=(6, 1)),
]


class Sized:
    """A model as far as its size goes."""

    def __init__(self, parameters):
        self.parameters = parameters

    def num_parameters(self):
        return self.parameters


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(7_000_000_000, 1e-5), (7_000_000, 1e-5 * 1000**0.6), (7_000, 1e-3)],  # 1000^0.6 = 63.1; the last one is capped
)
def test_the_usual_rate_goes_with_the_size(parameters, expected):
    assert peak_learning_rate(Optim(), Sized(parameters), usual=1e-5) == pytest.approx(expected)
    assert peak_learning_rate(Optim(learning_rate=3e-2), Sized(parameters), usual=1e-5) == 3e-2


def test_each_algorithm_starts_from_its_own_usual_rate(tiny):
    model, _ = load_policy(tiny)
    scale = (7e9 / model.num_parameters()) ** 0.6
    by_grpo = grpo.State.create(model, grpo.Config(), prompts=4, total_steps=1, seed=0).optimiser
    by_ppo = ppo.State.create(model, ppo.Config(), prompts=4, total_steps=1, seed=0).optimiser
    by_sft = sft.State.create(model, 4, sft.Config(), seed=0).optimiser
    assert by_grpo.param_groups[0]["peak_lr"] == pytest.approx(min(1e-3, 1e-6 * scale))
    assert by_ppo.param_groups[1]["peak_lr"] == by_grpo.param_groups[0]["peak_lr"]
    assert by_sft.param_groups[0]["peak_lr"] == pytest.approx(min(1e-3, 2e-5 * scale))


def learn(model, *, steps, config):
    state = sft.State.create(model, len(DATA), config, seed=0)
    return [sft.step(state, DATA, config=config)["loss"] for _ in range(steps)]


def test_bfloat16_learns_what_float32_learns():
    """At this rate nearly every step is smaller than half the distance between two bfloat16 weights."""
    config = sft.Config(epochs=40, batch_size=2, optim=Optim(learning_rate=3e-5, lr_schedule="constant"))
    full, half = tiny_llama(8), tiny_llama(8).bfloat16()
    expected = learn(full, steps=40, config=config)
    found = learn(half, steps=40, config=config)
    assert expected[-1] < 0.3 * expected[0]
    assert found[-1] == pytest.approx(expected[-1], abs=0.1)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(half.parameters(), masters(half).values(), strict=True))
    # another optimiser on the same weights starts from what they are now, and copies have no master
    assert learn(half, steps=2, config=config)[0] == pytest.approx(found[-1], abs=0.1)
    assert masters(copy.deepcopy(half)) == masters(full) == {}


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """256 + 1 a thousand times is 256 in bfloat16."""
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimiser = adamw([(layer.parameters(), 1.0)], Optim())
    for scale in (256.0, *[1.0] * 1000):
        (layer(torch.ones(1, 1, dtype=torch.bfloat16)) * scale).sum().backward()
    assert layer.weight.grad is None
    assert masters(layer)["weight"].grad.item() == 1256
    found = optimiser_step(optimiser, scale=1.0, max_grad_norm=1.0, where="test")
    assert found["grad_norm"] == 1256
    assert masters(layer)["weight"].grad is None


def test_a_ppo_step_in_bfloat16_and_its_checkpoint(tiny, tmp_path):
    model, tokenizer = load_policy(tiny, dtype=torch.bfloat16)
    config = ppo.Config(group_size=4, sampling=Sampling(max_new_tokens=6))
    state = ppo.State.create(model, config, prompts=1, total_steps=1, seed=0)
    result = ppo.step(
        state,
        [Prompt(ids=(0, 70), text="a")],
        generate=Engine(model, tokenizer),
        score=FunctionScorer(lambda _, completion: float(completion.ids[0] < 130)),
        config=config,
    )
    assert result.metrics["sampling/logprob_gap_max"] < 0.1
    Snapshot.of(state).write(tmp_path)
    saved = load_file(tmp_path / "tensors.safetensors")
    for field, module in (("policy", state.policy), ("critic", state.critic)):
        for name, weight in module.named_parameters():
            master = saved[f"{field}.master.{name}"]
            assert master.dtype == torch.float32
            assert torch.equal(weight, master.bfloat16())
