"""Reward-model training: Bradley-Terry on preference pairs, with the held-out accuracy in charge.

    loss = mean over pairs of -log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2

A reward model learns its pairs within an epoch or two and then only grows surer of itself. So the held-out accuracy is
measured several times an epoch, training stops when it has not improved for ``patience`` measurements, and the weights
of the best one are what is left in the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.algorithms.optimise import (
    Guard,
    Optim,
    adamw,
    guarded_step,
    lr_scale,
    peak_learning_rate,
    require_finite,
)
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor, within_budget
from tether.errors import ConfigError
from tether.interruption import stoppable
from tether.models.flops import forward_flops, shape_of
from tether.models.reward import score_batch, score_sequences
from tether.ops.losses import bradley_terry
from tether.types import Batch, Metrics, PreferencePair, Row

LEARNING_RATE = 1e-5
"""Usual for a model of 7e9 parameters."""
EMBEDDING_RATE = 3.0
"""The token embeddings' learning rate, as a multiple: a token's row moves only when the token occurs, and in an epoch
or two most words occur a few times at most."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward-model training."""

    epochs: float = 2.0
    """Passes over the pairs, if early stopping does not end them before."""
    batch_size: int = 32
    """Pairs an optimiser step."""
    centring: float = 0.01
    """Weight of (r_w + r_l)^2, which holds the scores near 0."""
    evals_per_epoch: int = 4
    """Measurements of held-out accuracy an epoch."""
    patience: int = 4
    """Stop after this many measurements without a better one; 0 never stops early."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass; it does not change the gradient."""
    optim: Optim = field(default_factory=lambda: Optim(warmup_steps=20))

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "epochs must be positive": self.epochs > 0,
                "batch_size must be at least 1": self.batch_size >= 1,
                "centring must be 0 or more": self.centring >= 0,
                "evals_per_epoch must be at least 1": self.evals_per_epoch >= 1,
                "patience must be 0 or more": self.patience >= 0,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
            }
        )

    def total_steps(self, pairs: int) -> int:
        """Optimiser steps for this many pairs."""
        return max(1, round(self.epochs * pairs / min(self.batch_size, pairs)))

    def steps_between_evals(self, pairs: int) -> int:
        return max(1, pairs // (min(self.batch_size, pairs) * self.evals_per_epoch))


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    model: PreTrainedModel
    optimiser: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    total_steps: int
    step: int = 0
    row: Metrics = field(default_factory=dict)
    """Of the last step, as long as its evaluation is due."""
    best_accuracy: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    evals_without_better: int = 0

    @staticmethod
    def create(model: PreTrainedModel, pairs: int, config: Config, *, seed: int) -> State:
        rate = peak_learning_rate(config.optim, model, usual=LEARNING_RATE)
        embedding = list(cast(nn.Embedding, model.get_input_embeddings()).parameters())
        others = [p for p in model.parameters() if not any(p is weight for weight in embedding)]
        return State(
            model=model,
            optimiser=adamw([(others, rate), (embedding, EMBEDDING_RATE * rate)], config.optim),
            cursor=Cursor(pairs, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(pairs),
        )

    def over(self, config: Config) -> bool:
        """Whether the schedule or the patience has come to its end."""
        impatient = config.patience > 0 and self.evals_without_better >= config.patience
        return not self.row and (impatient or self.step >= self.total_steps)


def sides(pairs: Sequence[PreferencePair]) -> list[Row]:
    """All chosen rows, then all rejected ones."""
    chosen: list[Row] = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    return chosen + [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]


def pair_batches(pairs: Sequence[PreferencePair], token_budget: int) -> list[Tensor]:
    """Index tensors of pairs for one forward and backward pass each; both sides of a pair stay together."""
    index: dict[tuple[int, ...], int] = {}
    return within_budget(
        [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs],
        [len(pair.prompt_ids) for pair in pairs],
        [index.setdefault(pair.prompt_ids, len(index)) for pair in pairs],
        token_budget,
    )


def step(state: State, pairs: Sequence[PreferencePair], *, config: Config) -> Metrics:
    """One optimiser step on ``pairs``."""
    clock = PhaseClock(state.model.device)
    with clock.phase("update"):
        metrics = update(state, pairs, config=config)
    lengths = [(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)]) for pair in pairs]
    metrics["flops/update"] = 3 * forward_flops(shape_of(state.model), lengths)
    return metrics | clock.metrics()


def update(state: State, pairs: Sequence[PreferencePair], *, config: Config) -> Metrics:
    """Gradient and optimiser step; without ``loss`` and what belongs to it where the step was skipped."""
    where = f"reward step {state.step + 1}"
    device = state.model.device

    def gradient(token_budget: int) -> Metrics:
        chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
        total = 0.0
        for part in stoppable(pair_batches(pairs, token_budget)):
            members = [pairs[i] for i in part.tolist()]
            r_w, r_l = score_batch(state.model, Batch.collate(sides(members), device)).chunk(2)
            margin = torch.tensor([pair.margin for pair in members], device=device)
            loss = bradley_terry(r_w, r_l, margin, centring=config.centring).sum() / len(pairs)
            require_finite(loss, what="the loss", where=where)
            loss.backward()
            total += loss.item()
            chosen[part], rejected[part] = r_w.detach().cpu(), r_l.detach().cpu()
        return {"loss": total, **score_metrics(chosen, rejected)}

    scale = lr_scale(config.optim, state.step, state.total_steps)
    taken = guarded_step(state.guard, state.optimiser, gradient, scale=scale, config=config.optim, where=where)
    state.step += 1
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    figures = taken[0] | taken[1] if taken else {}
    return figures | state.guard.metrics() | {"num_tokens": float(tokens)}


def score_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """What the scores [N] of both sides say of the pairs that were learned from."""
    difference = chosen - rejected
    return {
        "accuracy": float((difference > 0).float().mean()),
        "margin": float(difference.mean()),
        "mean_reward": float(torch.cat([chosen, rejected]).mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a reward model does on pairs it has not seen."""

    pairs: int
    accuracy: float
    """Share of pairs whose chosen side scores higher; a tie counts half."""
    log_loss: float
    """Mean of -log sigmoid(r_w - r_l), nats; log 2 = 0.693 is a coin's."""
    calibration_error: float
    """Expected calibration error: mean over pairs of |accuracy - confidence| in ten bins of confidence."""
    bins: tuple[tuple[float, float, int], ...]
    """The bins that hold pairs: (mean confidence, accuracy, pairs)."""
    mean_margin: float
    """Mean of r_w - r_l."""

    def metrics(self) -> Metrics:
        return {
            "eval/accuracy": self.accuracy,
            "eval/loss": self.log_loss,
            "eval/calibration_error": self.calibration_error,
            "eval/margin": self.mean_margin,
        }


def evaluate(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int) -> Evaluation:
    """Accuracy, log loss and calibration on ``pairs``."""
    scores = score_sequences(model, sides(pairs), token_budget=token_budget)
    require_finite(scores, what="the score", where="reward evaluation")
    chosen, rejected = scores.chunk(2)
    return assess(chosen - rejected)


def assess(difference: Tensor) -> Evaluation:
    """The evaluation that score differences r_w - r_l [N] amount to.

    The confidence of a pair is sigmoid(|r_w - r_l|), the probability that the model gives to the side it prefers.
    """
    right = torch.where(difference == 0, 0.5, (difference > 0).double())
    confidence = difference.double().abs().sigmoid()
    edges = torch.linspace(0.5, 1.0, 11, dtype=torch.float64)
    which = torch.bucketize(confidence, edges[1:-1], right=True)
    bins = [
        (float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for b in range(10)
        if (inside := which == b).any()
    ]
    return Evaluation(
        pairs=len(difference),
        accuracy=float(right.mean()),
        log_loss=float(-torch.nn.functional.logsigmoid(difference.double()).mean()),
        calibration_error=sum(n * abs(a - c) for c, a, n in bins) / len(difference),
        bins=tuple(bins),
        mean_margin=float(difference.mean()),
    )


def train(
    state: State,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    *,
    config: Config,
    on_step: Callable[[Metrics], None],
) -> Evaluation:
    """Train until the schedule or the patience ends, put the best weights back, and normalise.

    The best weights are those with the highest held-out accuracy; where that is too close to call, those with the lower
    log loss (:func:`better`). ``on_step`` gets each step's metrics, with held-out figures where they were measured.
    """

    def measure(token_budget: int) -> Evaluation:
        return evaluate(state.model, held_out, token_budget=token_budget)

    every = config.steps_between_evals(len(pairs))
    while not state.over(config):
        if not state.row:
            with state.cursor.undone_unless_done():
                state.row = step(state, state.cursor.take(pairs, min(config.batch_size, len(pairs))), config=config)
        metrics = dict(state.row)
        if state.step % every == 0 or state.step == state.total_steps:
            clock = PhaseClock(state.model.device)
            with clock.phase("eval"):
                evaluation = state.guard.fit(measure)
            metrics |= evaluation.metrics() | clock.metrics()
            keep_best(state, evaluation)
        state.row = {}
        on_step(metrics)
    state.model.load_state_dict(state.best_weights)
    state.guard.fit(lambda budget: normalise(state.model, pairs, token_budget=budget))
    return state.guard.fit(measure)


def keep_best(state: State, evaluation: Evaluation) -> None:
    """Remember the weights if this evaluation is the best so far."""
    if better(evaluation, accuracy=state.best_accuracy, log_loss=state.best_loss):
        state.best_accuracy, state.best_loss = evaluation.accuracy, evaluation.log_loss
        state.best_step, state.evals_without_better = state.step, 0
        state.best_weights = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    else:
        state.evals_without_better += 1


def better(evaluation: Evaluation, *, accuracy: float, log_loss: float) -> bool:
    """Whether an evaluation is better than an earlier one with this ``accuracy`` and ``log_loss`` on the same pairs.

    Accuracy decides, but only beyond its standard error sqrt(a (1 - a) / pairs): the highest of several readings on a
    few hundred pairs is mostly luck. Within it the log loss decides, which uses how sure each answer was.
    """
    a = evaluation.accuracy
    if abs(a - accuracy) > math.sqrt(a * (1 - a) / evaluation.pairs):
        return a > accuracy
    return evaluation.log_loss < log_loss


def normalise(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int, most: int = 1000) -> None:
    """Store in the model's configuration the mean and standard deviation of its scores on both sides of ``pairs``.

    Rewards then have mean 0 and variance 1 on the kind of completions that the pairs were made of, whatever scale the
    training left behind. The first ``most`` pairs are enough.
    """
    scores = score_sequences(model, sides(pairs[:most]), token_budget=token_budget)
    model.config.score_mean = float(scores.mean())
    model.config.score_std = max(float(scores.std(unbiased=False)), 1e-6)
