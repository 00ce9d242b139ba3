"""Reward-model training: Bradley-Terry on preference pairs, with early stopping on held-out accuracy.

    loss = mean over pairs of -log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2

A reward model learns its pairs within an epoch or two; after that only its confidence grows. Held-out accuracy is
therefore measured several times per epoch, training stops when it has not improved for ``patience`` evaluations, and
the model ends with the weights of the best one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.algorithms.epochs import epochs
from tether.algorithms.optimise import (
    Guard,
    Optim,
    accumulate,
    adamw,
    apply,
    lr_scale,
    peak_learning_rate,
    require_finite,
)
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor, epoch_steps, within_budget
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import forward_flops, shape_of
from tether.models.reward import score_batch, score_sequences
from tether.ops.losses import bradley_terry
from tether.types import Batch, Metrics, PreferencePair, PromptCompletion, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 1e-5
"""The usual rate for a model with 7e9 parameters."""
EMBEDDING_RATE = 3.0
"""Multiple of the learning rate for the token embeddings: a row moves only when its token occurs, and most words occur
at most a few times in an epoch or two."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward-model training."""

    epochs: float = 2.0
    """Epochs over the pairs, unless early stopping ends them; a fraction is rounded up in steps."""
    batch_size: int = 32
    """Pairs per optimizer step; the last step of an epoch may have fewer."""
    centring: float = 0.0
    """Weight of (r_w + r_l)^2, which keeps scores near 0 and shrinks their differences; 0 is off."""
    evals_per_epoch: int = 4
    """Evaluations on the held-out pairs per epoch."""
    patience: int = 4
    """Early stopping: evaluations without a better one after which training stops; 0 is off."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
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
        """Optimizer steps for this many pairs (:func:`tether.data.batching.epoch_steps`)."""
        return epoch_steps(self.epochs, count=pairs, batch_size=self.batch_size)

    def evaluates_after(self, step: int, pairs: int) -> bool:
        """Whether the held-out pairs are due after step ``step``, from 1: ``evals_per_epoch`` times per epoch, evenly
        spread, of which the last is at its end; after every step where an epoch has fewer steps."""
        per_epoch = epoch_steps(1, count=pairs, batch_size=self.batch_size)
        return (step * self.evals_per_epoch) // per_epoch > ((step - 1) * self.evals_per_epoch) // per_epoch


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    total_steps: int
    step: int = 0
    pending: Metrics | None = None
    """Metrics of the last step while its held-out evaluation is due; otherwise None."""
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
            optimizer=adamw([(others, rate), (embedding, EMBEDDING_RATE * rate)], config.optim),
            cursor=Cursor(pairs, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(pairs),
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def over(self, config: Config) -> bool:
        """Whether the schedule or the patience is exhausted."""
        impatient = config.patience > 0 and self.evals_without_better >= config.patience
        return impatient or self.step >= self.total_steps


def sides(pairs: Sequence[PreferencePair]) -> list[PromptCompletion]:
    """All chosen rows, then all rejected ones."""
    chosen: list[PromptCompletion] = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    return chosen + [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]


def pair_batches(pairs: Sequence[PreferencePair], token_budget: int) -> list[Tensor]:
    """Index tensors of pairs, one per forward and backward pass; both sides of a pair stay together."""
    index: dict[tuple[int, ...], int] = {}
    return within_budget(
        [len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs],
        [len(pair.prompt_ids) for pair in pairs],
        [index.setdefault(pair.prompt_ids, len(index)) for pair in pairs],
        token_budget,
    )


def step(state: State, pairs: Sequence[PreferencePair], *, config: Config, world: World = ALONE) -> StepResult:
    """One optimizer step on ``pairs``. A skipped step has no ``loss`` or other figures of the update."""
    clock = PhaseClock(state.device)
    with clock.phase("update"):
        figures, taken = update(state, pairs, config=config, world=world)
    lengths = [(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)]) for pair in pairs]
    figures["flops/update"] = Sum(3 * forward_flops(shape_of(state.model), lengths))
    return StepResult(metrics=reduce(figures | clock.figures(), world) | taken | state.guard.metrics())


def update(state: State, pairs: Sequence[PreferencePair], *, config: Config, world: World) -> tuple[Figures, Metrics]:
    """Compute the gradient and take the optimizer step."""
    chosen, rejected = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    count = world.sum(len(pairs))

    def loss_of(part: Tensor) -> Tensor:
        members = [pairs[i] for i in part.tolist()]
        r_w, r_l = score_batch(state.model, Batch.collate(sides(members), state.device)).chunk(2)
        chosen[part], rejected[part] = r_w.detach().cpu(), r_l.detach().cpu()
        margin = torch.tensor([pair.margin for pair in members], device=state.device)
        return bradley_terry(r_w, r_l, margin, centring=config.centring).sum() / count

    accumulated = accumulate(state.guard, state.optimizer, partial(pair_batches, pairs), loss_of, world=world)
    taken = apply(
        state.guard,
        state.optimizer,
        accumulated,
        scale=lr_scale(config.optim, state.step, state.total_steps),
        config=config.optim,
        where=f"reward step {state.step + 1}",
        world=world,
    )
    state.step += 1
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    figures: Figures = {"num_tokens": Sum(float(tokens))}
    if taken is None:
        return figures, {}
    return figures | {"loss": Sum(accumulated.loss)} | score_figures(chosen, rejected), taken


def score_figures(chosen: Tensor, rejected: Tensor) -> Figures:
    """Accuracy, margin and mean reward on the step's pairs, from the scores [N] of both sides."""
    difference = chosen - rejected
    return {
        "accuracy": Mean(float((difference > 0).float().mean()), len(chosen)),
        "margin": Mean(float(difference.mean()), len(chosen)),
        "mean_reward": Mean(float(torch.cat([chosen, rejected]).mean()), len(chosen)),
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of a reward model on held-out pairs."""

    pairs: int
    accuracy: float
    """Share of pairs whose chosen side scores higher; a tie counts half."""
    log_loss: float
    """Mean of -log sigmoid(r_w - r_l), nats; random guessing has log 2 = 0.693."""
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
    """The evaluation of score differences r_w - r_l [N].

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


def steps(
    state: State,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    *,
    config: Config,
    world: World = ALONE,
) -> Iterator[StepResult]:
    """All remaining steps, with held-out figures ``evals_per_epoch`` times per epoch; call :func:`finish` afterwards.

    The state keeps the weights of the best evaluation (:func:`keep_best`).
    """

    def measure() -> Metrics:
        evaluation = state.guard.fit(lambda budget: evaluate(state.model, held_out, token_budget=budget), world)
        keep_best(state, evaluation)
        return evaluation.metrics()

    return epochs(
        state,
        pairs,
        batch_size=config.batch_size,
        step=lambda rows: step(state, rows, config=config, world=world),
        over=lambda: state.over(config),
        evaluate=measure,
        due=lambda: config.evaluates_after(state.step, len(pairs)) or state.step == state.total_steps,
    )


def finish(state: State, pairs: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> Evaluation:
    """Restore the best weights, normalise on the training pairs, and evaluate once more.

    The best weights are those with the highest held-out accuracy or, within its standard error, those with the lower
    log loss (:func:`better`).
    """
    state.model.load_state_dict(state.best_weights)
    state.guard.fit(lambda budget: normalise(state.model, pairs, token_budget=budget))
    return state.guard.fit(lambda budget: evaluate(state.model, held_out, token_budget=budget))


def keep_best(state: State, evaluation: Evaluation) -> None:
    """Remember the weights if this evaluation is the best so far."""
    if better(evaluation, accuracy=state.best_accuracy, log_loss=state.best_loss):
        state.best_weights = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
        state.best_accuracy, state.best_loss = evaluation.accuracy, evaluation.log_loss
        state.best_step, state.evals_without_better = state.step, 0
    else:
        state.evals_without_better += 1


def better(evaluation: Evaluation, *, accuracy: float, log_loss: float) -> bool:
    """Whether an evaluation is better than an earlier one with this ``accuracy`` and ``log_loss`` on the same pairs.

    Accuracy decides, but only beyond its standard error sqrt(a (1 - a) / pairs): the highest of several evaluations on
    a few hundred pairs is mostly noise. Within it the log loss decides, which takes confidence into account.
    """
    a = evaluation.accuracy
    if abs(a - accuracy) > math.sqrt(a * (1 - a) / evaluation.pairs):
        return a > accuracy
    return evaluation.log_loss < log_loss


def normalise(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int, most: int = 1000) -> None:
    """Store in the model's configuration the mean and standard deviation of its scores on both sides of ``pairs``.

    Rewards then have mean 0 and variance 1 on completions like those of the pairs, whatever their scale after training.
    The first ``most`` pairs are enough.
    """
    scores = score_sequences(model, sides(pairs[:most]), token_budget=token_budget)
    model.config.score_mean = float(scores.mean())
    model.config.score_std = max(float(scores.std(unbiased=False)), 1e-6)
