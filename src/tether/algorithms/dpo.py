"""Direct preference optimisation (DPO): the policy itself is the reward model.

With s(x, y) = log pi(y | x) - log pi_ref(y | x) and h = beta (s(x, y_w) - s(x, y_l)) - margin, the loss of a pair is

    sigmoid  -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h)
    ipo      (h / beta - 1 / (2 beta))^2
    hinge    max(0, 1 - h)

plus ``sft_coef`` times the chosen side's mean negative log-likelihood per token. Where preferences are Bradley-Terry's
of a reward r, the sigmoid loss is least for pi proportional to pi_ref exp(r / beta), the optimum of r - beta KL. The
log-probs of the reference are computed once, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
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
from tether.algorithms.pair_evaluation import Evaluation, evaluation_of
from tether.algorithms.phases import PhaseClock
from tether.algorithms.reward_model import lengths_of, pair_batches, sides
from tether.data.batching import Cursor, epoch_steps
from tether.errors import ConfigError
from tether.figures import Figures, Mean, Sum, reduce
from tether.models.flops import training_flops
from tether.models.policy import completion_logprobs
from tether.ops.losses import PreferenceLoss, preference_loss
from tether.stop_requests import anywhere, at_safe_points, stoppable
from tether.types import Batch, Metrics, PreferencePair, StepResult
from tether.world import ALONE, World

LEARNING_RATE = 1e-6
"""The usual rate for a model with 7e9 parameters."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DPO."""

    beta: float = 0.1
    """Weight of the KL to the reference in the objective that the pairs stand for: the lower, the further the policy
    may move."""
    loss: PreferenceLoss = "sigmoid"
    """sigmoid is DPO's; ipo bounds how far a pair is driven apart, at 1 / (2 beta); hinge stops at a margin of 1."""
    label_smoothing: float = 0.0
    """Share of the pairs whose preference is taken to be the wrong way round; with the sigmoid loss."""
    length_normalise: bool = False
    """Take the mean log-prob per token of a side in place of the sum."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen sides, per token; 0 is off."""
    epochs: float = 1.0
    """Epochs over the pairs; a fraction is rounded up in steps."""
    batch_size: int = 32
    """Pairs per optimizer step; the last step of an epoch may have fewer."""
    evals_per_epoch: int = 1
    """Evaluations on the held-out pairs per epoch."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward and backward pass. It trades memory for speed and does not change the gradient."""
    optim: Optim = field(default_factory=lambda: Optim(warmup_steps=20))

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "beta must be positive": self.beta > 0,
                "label_smoothing must be 0 or more and less than 0.5": 0 <= self.label_smoothing < 0.5,
                "label_smoothing needs loss sigmoid": not self.label_smoothing or self.loss == "sigmoid",
                "sft_coef must be 0 or more": self.sft_coef >= 0,
                "epochs must be positive": self.epochs > 0,
                "batch_size must be at least 1": self.batch_size >= 1,
                "evals_per_epoch must be at least 1": self.evals_per_epoch >= 1,
                "micro_batch_tokens must be at least 1": self.micro_batch_tokens >= 1,
            },
        )

    def total_steps(self, pairs: int) -> int:
        """Optimizer steps for this many pairs (:func:`tether.data.batching.epoch_steps`)."""
        return epoch_steps(self.epochs, count=pairs, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ReferredPair:
    """A pair, with what the reference says of its sides."""

    pair: PreferencePair
    ref_chosen: float
    """log pi_ref(y_w | x): the sum over the tokens of the chosen side."""
    ref_rejected: float


@dataclass(kw_only=True)
class State:
    """The training state: everything a resumed run needs."""

    policy: PreTrainedModel
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    total_steps: int
    step: int = 0
    pending: Metrics | None = None
    """Metrics of the last step until :func:`steps` has evaluated and given them; otherwise None."""
    ref_logp: Tensor | None = None
    """The reference's log-probs [2, N] of the sides of the pairs, once :func:`refer` has them."""
    ref_logp_held_out: Tensor | None = None

    @staticmethod
    def create(
        policy: PreTrainedModel, pairs: int, config: Config, *, seed: int, optimizer: OptimizerFactory | None = None
    ) -> State:
        """A new state for a data set of this many ``pairs``; ``optimizer`` replaces AdamW
        (:func:`tether.algorithms.optimise.optimizer_for`)."""
        rate = peak_learning_rate(config.optim, policy, usual=LEARNING_RATE)
        return State(
            policy=policy,
            optimizer=optimizer_for([(policy.parameters(), rate)], config.optim, optimizer),
            cursor=Cursor(pairs, seed),
            guard=Guard(token_budget=config.micro_batch_tokens),
            total_steps=config.total_steps(pairs),
        )

    def abandon(self) -> None:
        """Drop the metrics of a step whose evaluation was interrupted; the step stays taken."""
        self.pending = None

    @property
    def device(self) -> torch.device:
        return self.policy.device


@torch.no_grad()
def pair_logprobs(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int) -> Tensor:
    """log pi(y | x) of the chosen and the rejected sides, [2, N], float32."""
    found = torch.zeros(2, len(pairs))
    for part in stoppable(pair_batches(pairs, token_budget)):
        batch = Batch.collate(sides([pairs[i] for i in part.tolist()]), model.device)
        (logp,) = completion_logprobs(model, batch, temperature=1.0)
        found[:, part] = logp.sum(1).float().cpu().view(2, -1)
    return found


def refer(model: PreTrainedModel, pairs: Sequence[PreferencePair], *, token_budget: int = 8192) -> list[ReferredPair]:
    """The pairs with the log-probs of ``model``, the reference: the policy itself before its first step, as a rule.

    Raises :class:`tether.errors.GuardError` where one is not finite.
    """
    return with_logprobs(pairs, pair_logprobs(model, pairs, token_budget=token_budget))


def with_logprobs(pairs: Sequence[PreferencePair], logp: Tensor) -> list[ReferredPair]:
    """The pairs with the reference's log-probs [2, N]."""
    require_finite(logp, what="a log-prob of the reference", where="dpo")
    return [
        ReferredPair(pair=pair, ref_chosen=chosen, ref_rejected=rejected)
        for pair, chosen, rejected in zip(pairs, *logp.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Compared:
    """The log-probs of some pairs' sides, each [N], and how far they are from the reference's."""

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    """s(x, y_w), or its mean per token with ``length_normalise``."""
    rejected_ratio: Tensor

    @staticmethod
    def of(pairs: Sequence[ReferredPair], chosen: Tensor, rejected: Tensor, config: Config) -> Compared:
        """From the sums of log-probs [N] of both sides."""
        device = chosen.device
        lengths = torch.tensor([[len(p.pair.chosen_ids), len(p.pair.rejected_ids)] for p in pairs], device=device).T
        reference = torch.tensor([[p.ref_chosen, p.ref_rejected] for p in pairs], device=device).T
        by = lengths if config.length_normalise else torch.ones_like(lengths)
        ratio_w, ratio_l = (chosen - reference[0]) / by[0], (rejected - reference[1]) / by[1]
        return Compared(chosen, rejected, ratio_w, ratio_l)

    def loss(self, pairs: Sequence[ReferredPair], config: Config) -> Tensor:
        """The loss of each pair, [N]."""
        device = self.chosen.device
        loss = preference_loss(
            self.chosen_ratio - self.rejected_ratio,
            torch.tensor([one.pair.margin for one in pairs], device=device),
            beta=config.beta,
            kind=config.loss,
            label_smoothing=config.label_smoothing,
        )
        if config.sft_coef:
            tokens = torch.tensor([len(one.pair.chosen_ids) for one in pairs], device=device)
            loss = loss - config.sft_coef * self.chosen / tokens
        return loss

    def rewards(self, beta: float) -> Tensor:
        """The rewards that the policy implies, beta s, of both sides, [2, N]."""
        return beta * torch.stack([self.chosen_ratio, self.rejected_ratio])

    def figures(self, beta: float) -> Figures:
        """Their means, as TRL names them."""
        chosen, rejected = self.rewards(beta)
        difference, count = chosen - rejected, len(chosen)
        return {
            name: Mean(float(value.double().mean()), count)
            for name, value in {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": (difference > 0).float() + 0.5 * (difference == 0).float(),
                "rewards/margins": difference,
                "logps/chosen": self.chosen,
                "logps/rejected": self.rejected,
            }.items()
        }


@at_safe_points()
def step(state: State, pairs: Sequence[ReferredPair], *, config: Config, world: World = ALONE) -> StepResult:
    """One optimizer step on ``pairs`` (:func:`refer`). A skipped step has no ``loss`` or other figures of the update.

    A step that is interrupted before it changes the weights counts as not begun.
    """
    require_settled(state, where=f"dpo step {state.step + 1}")
    clock = PhaseClock(state.device)
    with clock.phase("update"):
        figures, taken = update(state, pairs, config=config, world=world)
    figures["flops/update"] = Sum(training_flops(state.policy, lengths_of([one.pair for one in pairs])))
    return StepResult(metrics=reduce(figures | clock.figures(), world) | taken | state.guard.metrics())


def update(state: State, pairs: Sequence[ReferredPair], *, config: Config, world: World) -> tuple[Figures, Metrics]:
    """Compute the gradient and take the optimizer step."""
    own = [one.pair for one in pairs]
    sums, count = torch.zeros(2, len(pairs)), world.sum(len(pairs))

    def loss_of(part: Tensor) -> Tensor:
        members = [pairs[i] for i in part.tolist()]
        batch = Batch.collate(sides([one.pair for one in members]), state.device)
        (logp,) = completion_logprobs(state.policy, batch, temperature=1.0)
        chosen, rejected = logp.sum(1).float().chunk(2)
        sums[:, part] = torch.stack([chosen, rejected]).detach().cpu()
        return Compared.of(members, chosen, rejected, config).loss(members, config).sum() / count

    accumulated, taken = descend(
        state,
        state.policy,
        partial(pair_batches, own),
        loss_of,
        optim=with_short_warmup(config.optim, state.total_steps),
        where=f"dpo step {state.step + 1}",
        world=world,
    )
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in own)
    figures: Figures = {"num_tokens": Sum(float(tokens))}
    if taken is None:
        return figures, {}
    compared = Compared.of(pairs, sums[0], sums[1], config)
    return figures | {"loss": Sum(accumulated.loss)} | compared.figures(config.beta), taken


def measure(policy: PreTrainedModel, pairs: Sequence[ReferredPair], *, config: Config, token_budget: int) -> Compared:
    """Log-probs of held-out pairs, beside the reference's. Raises :class:`tether.errors.GuardError` where one is not
    finite."""
    logp = pair_logprobs(policy, [one.pair for one in pairs], token_budget=token_budget)
    require_finite(logp, what="a log-prob", where="dpo evaluation")
    return Compared.of(pairs, logp[0], logp[1], config)


def evaluate(policy: PreTrainedModel, pairs: Sequence[ReferredPair], *, config: Config, token_budget: int) -> Metrics:
    """``eval/loss``, and the figures of a step on held-out pairs, as ``eval/...``."""
    compared = measure(policy, pairs, config=config, token_budget=token_budget)
    figures: Mapping[str, float] = reduce(compared.figures(config.beta), ALONE)
    loss = float(compared.loss(pairs, config).double().mean())
    return {"eval/loss": loss, **{f"eval/{name}": value for name, value in figures.items()}}


def judge(policy: PreTrainedModel, pairs: Sequence[ReferredPair], *, config: Config, token_budget: int) -> Evaluation:
    """The policy as a reward model, by the rewards that it implies."""
    compared = measure(policy, pairs, config=config, token_budget=token_budget)
    return evaluation_of([one.pair for one in pairs], compared.rewards(config.beta))


def steps(
    state: State,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair] = (),
    *,
    config: Config,
    world: World = ALONE,
    and_evaluate: Callable[[int], Callable[[], Metrics] | None] | None = None,
) -> Iterator[StepResult]:
    """All remaining steps, some with figures on the ``held_out`` pairs. The reference is the policy as it is before the
    first of them. ``and_evaluate(step)`` gives another evaluation that is due after a step."""
    referred, unseen = referred_of(state, pairs, held_out)
    spread = Spread(config.evals_per_epoch, epoch_steps(1, count=len(pairs), batch_size=config.batch_size))

    def on_pairs() -> Metrics:
        return state.guard.fit(lambda budget: evaluate(state.policy, unseen, config=config, token_budget=budget), world)

    def due() -> list[Callable[[], Metrics]]:
        pairs_due = unseen and (spread.due(state.step) or state.step == state.total_steps)
        also = and_evaluate(state.step) if and_evaluate else None
        return [*([on_pairs] if pairs_due else []), *([also] if also else [])]

    def evaluated() -> Metrics:
        with anywhere():
            return {name: value for measure in due() for name, value in measure().items()}

    yield from epochs(
        state,
        referred,
        batch_size=config.batch_size,
        step=lambda rows: step(state, rows, config=config, world=world),
        over=lambda: state.step >= state.total_steps,
        evaluate=evaluated,
        due=lambda: bool(due()),
    )


def referred_of(
    state: State, pairs: Sequence[PreferencePair], held_out: Sequence[PreferencePair]
) -> tuple[list[ReferredPair], list[ReferredPair]]:
    """Both kinds of pairs with the reference's log-probs, which are computed before the first step and kept in
    ``state``."""
    if state.ref_logp is None or state.ref_logp_held_out is None:
        if state.step:
            raise ConfigError("the state has taken steps without the log-probs of the reference", where="dpo")
        both = [*pairs, *held_out]
        logp = state.guard.fit(lambda budget: pair_logprobs(state.policy, both, token_budget=budget))
        state.ref_logp, state.ref_logp_held_out = logp[:, : len(pairs)].clone(), logp[:, len(pairs) :].clone()
    return with_logprobs(pairs, state.ref_logp), with_logprobs(held_out, state.ref_logp_held_out)
