"""Learning rates, a guarded optimizer step, and weights in less than full precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file

from enumerable import tiny_llama
from helpers import FunctionScorer
from tether.algorithms import grpo, ppo, sft
from tether.algorithms.optimise import (
    Accumulated,
    Guard,
    Optim,
    accumulate,
    adamw,
    apply,
    lr_scale,
    peak_learning_rate,
    require_finite,
)
from tether.errors import ConfigError, GuardError
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.masters import masters
from tether.models.reference import reference_of
from tether.runtime.state import RunState, Snapshot
from tether.types import Demonstration, Prompt, Sampling

DATA = [
    Demonstration(prompt_ids=(0, 3), completion_ids=(4, 5, 1)),
    Demonstration(prompt_ids=(0,), completion_ids=(6, 1)),
]


class Sized:
    """A stand-in that has a model's size only."""

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
    by_grpo = grpo.State.create(
        model, grpo.Config(), reference=reference_of(model), prompts=4, total_steps=1, seed=0
    ).optimizer
    by_ppo = ppo.State.create(
        model, ppo.Config(), reference=reference_of(model), prompts=4, total_steps=1, seed=0
    ).optimizer
    by_sft = sft.State.create(model, 4, sft.Config(), seed=0).optimizer
    assert by_grpo.param_groups[0]["peak_lr"] == pytest.approx(min(1e-3, 1e-6 * scale))
    assert by_ppo.param_groups[1]["peak_lr"] == by_grpo.param_groups[0]["peak_lr"]
    assert by_sft.param_groups[0]["peak_lr"] == pytest.approx(min(1e-3, 2e-5 * scale))


def learn(model, *, steps, config):
    state = sft.State.create(model, len(DATA), config, seed=0)
    return [sft.step(state, DATA, config=config).metrics["loss"] for _ in range(steps)]


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
    # another optimizer on the same weights starts from what they are now, and copies have no master
    assert learn(half, steps=2, config=config)[0] == pytest.approx(found[-1], abs=0.1)
    assert masters(copy.deepcopy(half)) == masters(full) == {}


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """256 + 1 a thousand times is 256 in bfloat16."""
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = adamw([(layer.parameters(), 1.0)], Optim())
    for scale in (256.0, *[1.0] * 1000):
        (layer(torch.ones(1, 1, dtype=torch.bfloat16)) * scale).sum().backward()
    assert layer.weight.grad is None
    assert masters(layer)["weight"].grad.item() == 1256
    found = apply(Guard(token_budget=1), optimizer, Accumulated(0.0), scale=1.0, config=Optim(), where="test")
    assert found["grad_norm"] == 1256
    assert masters(layer)["weight"].grad is None


def test_a_ppo_step_in_bfloat16_and_its_checkpoint(tiny, tmp_path):
    model, tokenizer = load_policy(tiny, dtype=torch.bfloat16)
    config = ppo.Config(group_size=4, sampling=Sampling(max_new_tokens=6))
    state = ppo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0)
    result = ppo.step(
        state,
        [Prompt(ids=(0, 70), text="a")],
        generator=Engine(model, tokenizer),
        scorer=FunctionScorer(lambda _, completion: float(completion.ids[0] < 130)),
        config=config,
    )
    assert result.metrics["sampling/logprob_gap_max"] < 0.1
    Snapshot.of(RunState(state)).write(tmp_path)
    saved = load_file(tmp_path / "tensors.safetensors")
    for field, module in (("policy", state.policy), ("critic", state.critic)):
        for name, weight in module.named_parameters():
            master = saved[f"algorithm.{field}.master.{name}"]
            assert master.dtype == torch.float32
            assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    config = Optim(lr_schedule=schedule, warmup_steps=2)
    assert [lr_scale(config, step, 6) for step in range(6)] == pytest.approx(expected)


def step_along(optimizer, guard=None, *, problem="", scale=1.0, **options):
    guard = guard or Guard(token_budget=1)
    config = Optim(**options)
    return apply(guard, optimizer, Accumulated(0.0, problem), scale=scale, config=config, where="step 3")


def test_gradients_are_clipped_for_each_group_and_the_norm_is_of_all():
    a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    optimizer = adamw([(a.parameters(), 1.0), (b.parameters(), 1.0)], Optim())
    a.weight.grad, b.weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    clipped = {}
    optimizer.register_step_pre_hook(lambda *_: clipped.update(a=a.weight.grad.item(), b=b.weight.grad.item()))
    found = step_along(optimizer, scale=0.5, max_grad_norm=2.0)
    assert found["grad_norm"] == pytest.approx(5.0)
    assert found["learning_rate"] == 0.5
    assert clipped == pytest.approx({"a": 2.0, "b": 2.0}, rel=1e-4)
    assert a.weight.grad is None


def broken(layer):
    layer.weight.grad, layer.bias.grad = torch.tensor([[math.nan]]), torch.tensor([1.0])


def test_a_step_that_is_not_finite_is_skipped_and_the_weights_stay():
    layer = torch.nn.Linear(1, 1)
    optimizer = adamw([(layer.parameters(), 1.0)], Optim())
    guard = Guard(token_budget=1, taken=1)
    before = layer.weight.detach().clone()
    broken(layer)
    assert step_along(optimizer, guard) is None
    assert step_along(optimizer, guard, problem="the loss is not finite in 1 of 1 places") is None
    assert (guard.skipped, guard.skipped_in_a_row, guard.taken) == (2, 2, 1)
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    broken(layer)
    with pytest.raises(GuardError, match=r"^step 3: the gradient is not finite \(nan\).*skipped 3 steps in a row"):
        step_along(optimizer, guard)


def test_the_first_step_of_a_run_is_never_skipped():
    layer = torch.nn.Linear(1, 1)
    optimizer = adamw([(layer.parameters(), 1.0)], Optim())
    broken(layer)
    with pytest.raises(GuardError, match="step 3: the gradient is not finite"):
        step_along(optimizer)


def test_accumulating_ends_at_a_loss_that_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = adamw([([weight], 1.0)], Optim())
    parts = [torch.tensor([float(i)]) for i in (1, math.inf, 2)]
    seen = []

    def loss_of(part):
        seen.append(part.item())
        return (weight * part).sum()

    found = accumulate(Guard(token_budget=1), optimizer, lambda _: parts, loss_of)
    assert found == Accumulated(1.0, "the loss is not finite in 1 of 1 places")
    assert seen == [1.0, math.inf]
    assert accumulate(Guard(token_budget=1), optimizer, lambda _: parts[::2], loss_of) == Accumulated(3.0)
    assert weight.grad.item() == 3.0  # what was accumulated before is gone


def test_guards_say_what_and_where():
    require_finite(torch.ones(3), what="the loss", where="here")
    with pytest.raises(GuardError, match="here: the loss is not finite in 1 of 3 places"):
        require_finite(torch.tensor([1.0, math.inf, 2.0]), what="the loss", where="here")


def test_bad_options_are_refused():
    for options, message in (({"learning_rate": 0.0}, "learning_rate"), ({"adam_beta2": 1.0}, "adam_beta")):
        with pytest.raises(ConfigError, match=message):
            Optim(**options)
