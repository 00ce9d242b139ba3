"""Supervised fine-tuning."""

from __future__ import annotations

import pytest
import torch

from tether.algorithms import sft
from tether.algorithms.optimise import Optim
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
    assert sft.step(state, DATA, config=sft.Config()).metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_it_learns_its_texts_by_heart(tiny):
    model, _ = load_policy(tiny)
    config = sft.Config(epochs=40, batch_size=6, optim=Optim(learning_rate=1e-2))
    state = sft.State.create(model, len(DATA), config, seed=0)
    while state.step < state.total_steps:
        sft.step(state, state.cursor.take(DATA, 6), config=config)
    assert sft.evaluate(model, DATA, token_budget=100)["eval/loss"] < 0.05


def test_epochs_are_kept_when_the_data_is_smaller_than_a_batch():
    config = sft.Config(epochs=3, batch_size=32)
    assert [config.total_steps(n) for n in (1, 8, 32, 64, 80)] == [3, 3, 3, 6, 9]
    assert sft.Config(epochs=0.1, batch_size=32).total_steps(8) == 1


def test_every_row_is_trained_on_once_an_epoch_and_the_held_out_loss_is_measured_at_its_end(tiny, monkeypatch):
    model, _ = load_policy(tiny)
    config = sft.Config(epochs=2.5, batch_size=4)
    state = sft.State.create(model, len(DATA), config, seed=0)
    original, taken = sft.step, []

    def step(state, rows, **more):
        taken.append([row.prompt_ids for row in rows])
        return original(state, rows, **more)

    monkeypatch.setattr(sft, "step", step)
    rows = [result.metrics for result in sft.steps(state, DATA, DATA[:2], config=config)]
    assert [len(batch) for batch in taken] == [4, 2, 4, 2, 4]
    everything = {one.prompt_ids for one in DATA}
    assert set(taken[0] + taken[1]) == set(taken[2] + taken[3]) == everything
    assert [n for n, row in enumerate(rows, 1) if "eval/loss" in row] == [2, 4, 5]
