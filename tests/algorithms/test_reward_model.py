"""Reward-model training: it learns a preference, keeps the best weights, and says how sure it may be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tether.algorithms import reward_model as rm
from tether.algorithms.optimise import Optim, lr_scale
from tether.algorithms.pair_evaluation import assess
from tether.models.reward import new_reward_model, normalised_scores, score_sequences
from tether.types import PreferencePair


def pairs(n, seed=0, *, flip=0.0):
    """Sequences of random tokens; the one with token 200 in it is preferred, but for a share of wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        a, b = (torch.randint(3, 190, (6,), generator=generator).tolist() for _ in range(2))
        a[int(torch.randint(6, (1,), generator=generator))] = 200
        if torch.rand((), generator=generator) < flip:
            a, b = b, a
        out.append(PreferencePair(prompt_ids=(0, 9), chosen_ids=(*a, 1), rejected_ids=(*b, 1)))
    return out


def train(tiny, data, held_out, **options):
    model, _ = new_reward_model(tiny, seed=0)
    config = rm.Config(optim=Optim(learning_rate=3e-3), **options)
    state = rm.State.create(model, len(data), config, seed=0)
    rows = [result.metrics for result in rm.steps(state, data, held_out, config=config)]
    return model, state, rows, rm.finish(state, data, held_out)


def test_it_learns_and_is_normalised(tiny):
    data = pairs(400)
    model, state, rows, evaluation = train(tiny, data, pairs(100, seed=1), epochs=4, batch_size=16)
    assert evaluation.accuracy > 0.95
    assert evaluation.log_loss < 0.3
    assert rows[-1]["loss"] < rows[0]["loss"]
    scores = normalised_scores(model, score_sequences(model, rm.sides(data)))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert state.step == 100


def test_early_stopping_keeps_the_best_weights(tiny):
    """Random labels can only be memorised: the held-out figures get worse, training stops, and the best are back."""
    held_out = pairs(80, seed=1, flip=0.5)
    _model, state, rows, evaluation = train(
        tiny, pairs(96, flip=0.5), held_out, epochs=40, batch_size=16, patience=3, evals_per_epoch=1
    )
    measured = [(n, row["eval/accuracy"], row["eval/loss"]) for n, row in enumerate(rows, 1) if "eval/loss" in row]
    assert state.step < 40 * 6
    assert len(measured) == state.best_step // 6 + 3
    best = next(row for row in measured if row[0] == state.best_step)
    assert (evaluation.accuracy, evaluation.log_loss) == pytest.approx(best[1:], rel=1e-5)


@pytest.mark.parametrize(
    ("accuracy", "log_loss", "expected"),
    [
        (0.76, 0.9, True),  # 0.16 above 0.6 at a standard error of 0.043
        (0.50, 0.1, False),  # 0.10 below it at 0.05
        (0.62, 0.7, False),  # within 0.049 of it: the log loss decides
        (0.58, 0.5, True),
    ],
)
def test_accuracy_decides_beyond_its_standard_error_and_log_loss_within(accuracy, log_loss, expected):
    measured = assess(torch.zeros(100), longer_by=torch.zeros(100), prompts=range(100))
    found = replace(measured, accuracy=accuracy, log_loss=log_loss)
    assert rm.better(found, accuracy=0.6, log_loss=0.6) is expected


def test_the_embeddings_get_three_times_the_rate(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    config = rm.Config(optim=Optim(learning_rate=1e-3))
    others, embedding = rm.State.create(model, 1, config, seed=0).optimizer.param_groups
    assert (others["peak_lr"], embedding["peak_lr"]) == pytest.approx((1e-3, 3e-3))
    assert embedding["params"][0] is model.get_input_embeddings().weight
    assert len(others["params"]) + 1 == len(list(model.parameters()))


def test_margins_and_centring_reach_the_loss(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    plain = PreferencePair(prompt_ids=(0,), chosen_ids=(5, 1), rejected_ids=(6, 1))
    wide = PreferencePair(prompt_ids=(0,), chosen_ids=(5, 1), rejected_ids=(6, 1), margin=3.0)
    r_w, r_l = score_sequences(model, rm.sides([plain])).tolist()

    def loss(pair, centring):
        config = rm.Config(centring=centring)
        state = rm.State.create(model, 1, config, seed=0)
        for group in state.optimizer.param_groups:
            group["peak_lr"] = 0.0
        return rm.step(state, [pair], config=config).metrics["loss"]

    assert loss(plain, 0.0) == pytest.approx(math.log1p(math.exp(r_l - r_w)), rel=1e-5)
    assert loss(wide, 0.0) == pytest.approx(math.log1p(math.exp(r_l - r_w + 3)), rel=1e-5)
    assert loss(plain, 0.5) == pytest.approx(math.log1p(math.exp(r_l - r_w)) + 0.5 * (r_w + r_l) ** 2, rel=1e-5)


def test_an_evaluation_that_is_repeated_for_lack_of_memory_counts_once(tiny, monkeypatch):
    data, held_out = pairs(8), pairs(8, seed=1)
    original, budgets = rm.evaluate, []

    def evaluate(model, rows, *, token_budget):
        budgets.append(token_budget)
        if len(budgets) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, rows, token_budget=token_budget)

    monkeypatch.setattr(rm, "evaluate", evaluate)
    _, state, rows, _ = train(tiny, data, held_out, epochs=1, batch_size=8, evals_per_epoch=1)
    assert budgets[:2] == [8192, 4096]
    assert (state.best_step, state.evals_without_better, len(rows)) == (1, 0, 1)
    assert state.best_weights


@pytest.mark.parametrize(
    ("count", "batch_size", "evals_per_epoch", "steps"),
    [
        (40, 16, 1, [3, 6]),
        (40, 4, 4, [3, 5, 8, 10, 13, 15, 18, 20]),
        (64, 16, 2, [2, 4, 6, 8]),
        (40, 16, 9, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_evaluations_are_spread_evenly_and_end_each_epoch(count, batch_size, evals_per_epoch, steps):
    config = rm.Config(epochs=2, batch_size=batch_size, evals_per_epoch=evals_per_epoch)
    spread = config.evaluations(count, cost=1e9)  # asked for, whatever they cost
    assert [step for step in range(1, config.total_steps(count) + 1) if spread.due(step)] == steps


@pytest.mark.parametrize(
    ("cost", "steps"),
    [
        (0.001, [5, 10, 15, 20, 25, 30, 35, 40]),  # cheap: four per epoch
        (0.04, [8, 16, 24, 32, 40]),  # 5 * 0.04 = 0.2, a tenth of two epochs
        (0.05, [10, 20, 30, 40]),
        (0.15, [40]),
        (9.0, [40]),  # one has to be
    ],
)
def test_by_default_evaluations_cost_at_most_a_tenth_of_the_training(cost, steps):
    config = rm.Config(epochs=2, batch_size=5)
    spread = config.evaluations(100, cost=cost)
    assert [step for step in range(1, 41) if spread.due(step)] == steps
    assert len(steps) == 1 or len(steps) * cost <= 0.1 * 2 + 1e-12


def test_the_cost_of_an_evaluation_is_counted(tiny):
    """Without attention FLOPs a forward pass is a third of a training step: 12 equal pairs cost a third of 12."""
    model, _ = new_reward_model(tiny, seed=0)
    data = pairs(12)
    assert rm.evaluation_cost(model, data, data) == pytest.approx(1 / 3)
    assert rm.evaluation_cost(model, data, data[:3]) == pytest.approx(1 / 12)


def test_a_run_evaluates_as_often_as_it_can_afford(tiny):
    """24 training pairs, 3 epochs, evaluations of 4 pairs: 0.3 * 24 * 3 / 4 = 5.4, so 5 in 12 steps."""
    _, _, rows, _ = train(tiny, pairs(24), pairs(4, seed=1), epochs=3, batch_size=6, patience=0)
    assert [n for n, row in enumerate(rows, 1) if "eval/loss" in row] == [3, 5, 8, 10, 12]


@pytest.mark.parametrize(("total", "warmup"), [(4, 0), (9, 0), (10, 1), (19, 1), (150, 15), (200, 20), (5000, 20)])
def test_the_warmup_is_at_most_a_tenth_of_the_run(total, warmup):
    optim = rm.with_short_warmup(rm.Config().optim, total)
    assert optim.warmup_steps == warmup
    assert max(lr_scale(optim, step, total) for step in range(total)) == 1
    assert lr_scale(optim, warmup, total) == 1


def test_a_short_run_is_not_spent_on_warmup(tiny):
    data, config = pairs(40), rm.Config(batch_size=8, epochs=4, optim=Optim(learning_rate=3e-3, warmup_steps=20))
    state = rm.State.create(new_reward_model(tiny, seed=0)[0], 40, config, seed=0)
    rates = [rm.step(state, data[:8], config=config).metrics["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3 * 17 / 18])  # 2 of 20 steps


def test_the_state_says_why_training_is_over(tiny):
    config = rm.Config(patience=3)
    model, _ = new_reward_model(tiny, seed=0)
    state = rm.State.create(model, 320, config, seed=0)
    state.step, state.evals_without_better = 7, 3
    assert (state.over(config), state.why_over(config)) == (True, "no better in 3")
    state.step, state.evals_without_better = 20, 2
    assert (state.over(config), state.why_over(config)) == (True, "end of the run")
