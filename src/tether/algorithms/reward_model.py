"""Reward-model training: Bradley-Terry on preference pairs, with early stopping by held-out accuracy.

    loss = mean over pairs of -log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2

A reward model learns its pairs within an epoch or two; after that only its confidence grows. Its accuracy on the
*stopping* pairs is therefore measured several times, training stops when it has not improved for ``patience``
evaluations, and the model ends with the weights of the best one. The accuracy of the best of several evaluations is too
high, so a model is judged by other pairs, which nothing here sees (:mod:`tether.algorithms.pair_evaluation`).
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

from tether.algorithms.epochs import Spread, descend, epochs, require_settled
from tether.algorithms.optimise import (
    Guard,
    Optim,
    OptimizerFactory,
    optimizer_for,
    peak_learning_rate,
    require_finite,
    with_short_warmup,
)
from tether.algorithms.pair_evaluation import Evaluation as Evaluation
from tether.algorithms.pair_evaluation import evaluation_of
from tether.algorithms.phases import PhaseClock
from tether.data.batching import Cursor, epoch_steps, within_budget
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import forward_flops, shape_of, training_flops
from tether.models.reward import score_batch, score_sequences
from tether.models.trainable import changing
from tether.ops.losses import bradley_terry
from tether.stop_requests import at_safe_points
from tether.types import Batch, Metrics, PreferencePair, PromptCompletion, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 1e-5
"""The usual rate for a model with 7e9 parameters."""
EMBEDDING_RATE = 3.0
"""Multiple of the learning rate for the token embeddings: a row moves only when its token occurs, and most words occur
at most a few times in an epoch or two."""
EVALUATION_SHARE = 0.1
"""Share of the training's FLOPs that evaluations take at most, and ..."""
USUAL_EVALUATIONS = 4
"""... how many there are per epoch where they are cheap, unless ``evals_per_epoch`` says how many there are."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward-model training."""

    epochs: float = 2.0
    """Epochs over the pairs, unless early stopping ends them; a fraction is rounded up in steps."""
    batch_size: int = 32
    """Pairs per optimizer step; the last step of an epoch may have fewer."""
    centring: float = 0.0
    """Weight of (r_w + r_l)^2, which keeps scores near 0 and shrinks their differences; 0 is off."""
    evals_per_epoch: int | None = None
    """Evaluations on the stopping pairs per epoch. By default at most 4, and so few that all of them take at most a
    tenth of the work of the training."""
    patience: int = 4
    """Early stopping: evaluations without a better one after which training stops; 0 is off."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
    optim: Optim = field(default_factory=lambda: Optim(warmup_steps=20))

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "epochs must be positive": self.epochs > 0,
                "batch_size must be at least 1": self.batch_size >= 1,
                "centring must be 0 or more": self.centring >= 0,
                "evals_per_epoch must be at least 1": self.evals_per_epoch is None or self.evals_per_epoch >= 1,
                "patience must be 0 or more": self.patience >= 0,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
            },
        )

    def total_steps(self, pairs: int) -> int:
        """Optimizer steps for this many pairs (:func:`tether.data.batching.epoch_steps`)."""
        return epoch_steps(self.epochs, count=pairs, batch_size=self.batch_size)

    def evaluations(self, pairs: int, *, cost: float) -> Spread:
        """When the stopping pairs are evaluated in a run on this many ``pairs``: ``evals_per_epoch`` times per epoch,
        the last at its end, or after every step where an epoch has fewer steps.

        By default as often as is affordable in the whole run, the last at its end, and at least once. An evaluation
        costs ``cost`` times what training on all pairs once does.
        """
        if self.evals_per_epoch is not None:
            return Spread(self.evals_per_epoch, epoch_steps(1, count=pairs, batch_size=self.batch_size))
        affordable = EVALUATION_SHARE * self.epochs / cost
        return Spread(max(1, int(min(affordable, USUAL_EVALUATIONS * self.epochs))), self.total_steps(pairs))


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
    """Metrics of the last step until :func:`steps` has evaluated and given them; otherwise None."""
    best_accuracy: float = 0.0
    best_loss: float = float("inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    evals_without_better: int = 0

    @staticmethod
    def create(
        model: PreTrainedModel, pairs: int, config: Config, *, seed: int, optimizer: OptimizerFactory | None = None
    ) -> State:
        """A new state for a data set of this many ``pairs``. ``optimizer`` makes the one that replaces AdamW
        (:func:`tether.algorithms.optimise.optimizer_for`), from two parameter groups: the embedding is the second."""
        rate = peak_learning_rate(config.optim, model, usual=LEARNING_RATE)
        embedding = list(cast(nn.Embedding, model.get_input_embeddings()).parameters())
        others = [p for p in model.parameters() if not any(p is weight for weight in embedding)]
        return State(
            model=model,
            optimizer=optimizer_for([(others, rate), (embedding, EMBEDDING_RATE * rate)], config.optim, optimizer),
            cursor=Cursor(pairs, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(pairs),
        )

    def abandon(self) -> None:
        """Drop the metrics of a step whose evaluation was interrupted; the step stays taken."""
        self.pending = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def over(self, config: Config) -> bool:
        """Whether the schedule or the patience is exhausted."""
        impatient = config.patience > 0 and self.evals_without_better >= config.patience
        return impatient or self.step >= self.total_steps

    def why_over(self, config: Config) -> str:
        """Why training is over, in words."""
        if self.step >= self.total_steps:
            return "end of the run"
        return f"no better in {config.patience}"


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


@at_safe_points()
def step(state: State, pairs: Sequence[PreferencePair], *, config: Config, world: World = ALONE) -> StepResult:
    """One optimizer step on ``pairs``. A skipped step has no ``loss`` or other figures of the update.

    A step that is interrupted before it changes the weights counts as not begun.
    """
    require_settled(state, where=f"reward step {state.step + 1}")
    clock = PhaseClock(state.device)
    with clock.phase("update"):
        figures, taken = update(state, pairs, config=config, world=world)
    figures["flops/update"] = Sum(training_flops(state.model, lengths_of(pairs)))
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

    accumulated, taken = descend(
        state,
        state.model,
        partial(pair_batches, pairs),
        loss_of,
        optim=with_short_warmup(config.optim, state.total_steps),
        where=f"reward step {state.step + 1}",
        world=world,
    )
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


def evaluate(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int) -> Evaluation:
    """Accuracy with its interval, log loss, calibration, and what length alone would say, on ``pairs``."""
    return evaluation_of(pairs, score_pairs(model, pairs, token_budget=token_budget))


def score_pairs(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int) -> Tensor:
    """Raw scores [2, N] of the chosen and the rejected sides. Raises :class:`GuardError` where one is not finite."""
    scores = score_sequences(model, sides(pairs), token_budget=token_budget)
    require_finite(scores, what="the score", where="reward evaluation")
    return scores.view(2, len(pairs))


def evaluation_cost(
    model: PreTrainedModel, pairs: Sequence[PreferencePair], stopping: Sequence[PreferencePair]
) -> float:
    """FLOPs of scoring the ``stopping`` pairs, as a multiple of those of training on all ``pairs`` once. They are
    counted, not timed, so that a run that is repeated or resumed has its evaluations after the same steps."""
    return forward_flops(shape_of(model), lengths_of(stopping)) / training_flops(model, lengths_of(pairs))


def lengths_of(pairs: Sequence[PreferencePair]) -> list[tuple[int, list[int]]]:
    """Tokens of each prompt, and of its two sides."""
    return [(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)]) for pair in pairs]


def steps(
    state: State,
    pairs: Sequence[PreferencePair],
    stopping: Sequence[PreferencePair],
    *,
    config: Config,
    world: World = ALONE,
) -> Iterator[StepResult]:
    """All remaining steps, some with figures on the ``stopping`` pairs (:meth:`Config.evaluations`); call
    :func:`finish` afterwards.

    The state keeps the weights of the best evaluation (:func:`keep_best`).
    """
    spread = config.evaluations(len(pairs), cost=evaluation_cost(state.model, pairs, stopping))
    return epochs(
        state,
        pairs,
        batch_size=config.batch_size,
        step=lambda rows: step(state, rows, config=config, world=world),
        over=lambda: state.over(config),
        evaluate=lambda: measure(state, stopping, world=world),
        due=lambda: spread.due(state.step) or state.step == state.total_steps,
    )


def measure(state: State, stopping: Sequence[PreferencePair], *, world: World = ALONE) -> Metrics:
    """Evaluate the weights on the ``stopping`` pairs, keep them if they are the best so far, and give the figures."""
    evaluation = state.guard.fit(lambda budget: evaluate(state.model, stopping, token_budget=budget), world)
    keep_best(state, evaluation)
    return evaluation.metrics()


def finish(state: State, pairs: Sequence[PreferencePair], judged: Sequence[PreferencePair]) -> Evaluation:
    """Restore the best weights, normalise, and evaluate on pairs to judge the model by.

    On the stopping pairs the accuracy is too high, because the weights were chosen by it.
    """
    restore_best(state, pairs)
    return state.guard.fit(lambda budget: evaluate(state.model, judged, token_budget=budget))


def restore_best(state: State, pairs: Sequence[PreferencePair]) -> None:
    """Give the model the best weights, and normalise its scores on the training ``pairs``.

    The best weights are those with the highest accuracy on the stopping pairs or, within its standard error, those with
    the lower log loss (:func:`better`).
    """
    state.model.load_state_dict(state.best_weights, strict=False)  # without what is frozen
    state.guard.fit(lambda budget: normalise(state.model, pairs, token_budget=budget))


def keep_best(state: State, evaluation: Evaluation) -> None:
    """Remember the weights if this evaluation is the best so far."""
    if better(evaluation, accuracy=state.best_accuracy, log_loss=state.best_loss):
        remember(state, evaluation, step=state.step)
        state.evals_without_better = 0
    else:
        state.evals_without_better += 1


def choose(state: State, stopping: Sequence[PreferencePair], *, step: int) -> None:
    """Take the weights that the model has now, which are those of ``step``, for the best, whatever was measured."""
    evaluation = state.guard.fit(lambda budget: evaluate(state.model, stopping, token_budget=budget))
    remember(state, evaluation, step=step)


def remember(state: State, evaluation: Evaluation, *, step: int) -> None:
    """Copy the weights, with their evaluation on the stopping pairs."""
    state.best_weights = {name: tensor.detach().clone() for name, tensor in changing(state.model).items()}
    state.best_accuracy, state.best_loss, state.best_step = evaluation.accuracy, evaluation.log_loss, step


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
