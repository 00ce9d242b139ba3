"""Supervised fine-tuning, and the optimiser step that all algorithms share."""

from __future__ import annotations

import math

import pytest
import torch

from tether.algorithms import sft
from tether.algorithms.optimise import Optim, adamw, lr_scale, optimiser_step, require_finite
from tether.errors import ConfigError, GuardError
from tether.models.loading import load_policy
from tether.types import Demonstration

DATA = [
    Demonstration(prompt_ids=(0, 70 + i), completion_ids=(*(100 + i, 101 + i, 1)[: 3 - i % 2], 1)) for i in range(6)
]


def test_loss_is_the_mean_over_completion_tokens_alone(tiny):
    """Against transformers' logits, token by token; prompt tokens carry none."""
    model, _ = load_policy(tiny)
    total, count = 0.0, 0
    for d in DATA:
        ids = torch.tensor([[*d.prompt_ids, *d.completion_ids]])
        logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        for t, token in enumerate(d.completion_ids):
            total -= logp[len(d.prompt_ids) - 1 + t, token].item()
            count += 1
    assert sft.evaluate(model, DATA, token_budget=20)["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    state = sft.State.create(model, len(DATA), sft.Config(), seed=0)
    assert sft.step(state, DATA, config=sft.Config())["loss"] == pytest.approx(total / count, rel=1e-5)


def test_it_learns_its_texts_by_heart(tiny):
    model, _ = load_policy(tiny)
    config = sft.Config(epochs=40, batch_size=6, optim=Optim(learning_rate=1e-2))
    state = sft.State.create(model, len(DATA), config, seed=0)
    while state.step < state.total_steps:
        sft.step(state, state.cursor.take(DATA, 6), config=config)
    assert sft.evaluate(model, DATA, token_budget=100)["eval/loss"] < 0.05


def test_epochs_are_kept_when_the_data_is_smaller_than_a_batch():
    config = sft.Config(epochs=3, batch_size=32)
    assert [config.total_steps(n) for n in (1, 8, 32, 64, 80)] == [3, 3, 3, 6, 8]
    assert sft.Config(epochs=0.1, batch_size=32).total_steps(8) == 1


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


def test_gradients_are_clipped_for_each_group_and_the_norm_is_of_all():
    a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    optimiser = adamw([(a.parameters(), 1.0), (b.parameters(), 1.0)], Optim())
    a.weight.grad, b.weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    clipped = {}
    optimiser.register_step_pre_hook(lambda *_: clipped.update(a=a.weight.grad.item(), b=b.weight.grad.item()))
    found = optimiser_step(optimiser, scale=0.5, max_grad_norm=2.0, where="test")
    assert found["grad_norm"] == pytest.approx(5.0)
    assert found["learning_rate"] == 0.5
    assert clipped == pytest.approx({"a": 2.0, "b": 2.0}, rel=1e-4)
    assert a.weight.grad is None


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    layer = torch.nn.Linear(1, 1)
    before = layer.weight.detach().clone()
    optimiser = adamw([(layer.parameters(), 1.0)], Optim())
    layer.weight.grad, layer.bias.grad = torch.tensor([[math.nan]]), torch.tensor([1.0])
    with pytest.raises(GuardError, match="step 3: the gradient is not finite"):
        optimiser_step(optimiser, scale=1.0, max_grad_norm=1.0, where="step 3")
    assert torch.equal(layer.weight, before)


def test_guards_say_what_and_where():
    require_finite(torch.ones(3), what="the loss", where="here")
    with pytest.raises(GuardError, match="here: the loss is not finite in 1 of 3 places"):
        require_finite(torch.tensor([1.0, math.inf, 2.0]), what="the loss", where="here")


def test_bad_options_are_refused():
    for options, message in (({"learning_rate": 0.0}, "learning_rate"), ({"adam_beta2": 1.0}, "adam_beta")):
        with pytest.raises(ConfigError, match=message):
            Optim(**options)
