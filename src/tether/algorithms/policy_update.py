"""The update that PPO and GRPO share: epochs of minibatches over a step's experience, one optimizer step each.

for each minibatch: accumulate over micro-batches -> stop early? -> apply
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.experience import Experience
from tether.algorithms.optimise import Accumulated, Guard, Optim, accumulate, apply, lr_scale, mean_of
from tether.algorithms.pending import Rollouts
from tether.data.batching import micro_batches, minibatches
from tether.digests import prompts_digest
from tether.figures import Figures, Max, Mean, Sum, reduce
from tether.models.balance import Balance
from tether.models.policy import unflatten
from tether.models.routes import Routes
from tether.ops.divergence import k2
from tether.ops.losses import LossInputs, LossTerms
from tether.ops.masked import masked_mean
from tether.ops.reduce import Reduction, reduce_loss
from tether.seeds import derive_seed
from tether.types import UNSAVED, Metrics, Prompt
from tether.world import World

E = TypeVar("E", bound=Experience)


class PolicyState(Protocol):
    """The part of an algorithm's state that an update uses."""

    policy: PreTrainedModel
    optimizer: torch.optim.Optimizer
    guard: Guard
    seed: int
    step: int
    total_steps: int


@dataclass(kw_only=True)
class Update(Generic[E]):
    """A policy update in progress: its experience and its progress through it. A complete one stays until the step that
    it belongs to is over."""

    experience: E
    prompts: str
    """Digest of the step's prompts."""
    completions: str
    """Digest of the step's completions."""
    rollouts: Rollouts | None = field(default=None, metadata=UNSAVED)
    """What the step rolled out; None where the update was restored from a checkpoint."""
    left_out: Tensor | None = None  # [N, T], log-probs under the reference
    """Of the completions that the experience leaves out, where it does."""
    kl: float
    """KL(pi || pi_ref) of the rollouts, nats per completion."""
    metrics: Metrics
    """Metrics of the experience."""
    passed: int = 0
    """Number of minibatches processed, over all epochs; all of them where the update stopped early."""
    taken: int = 0
    """Optimizer steps taken."""
    rows: list[Metrics] = field(default_factory=list)
    """Metrics of each of them."""
    gap: Metrics = field(default_factory=dict)
    """Differences between the sampler and the trainer at the first minibatch."""

    @staticmethod
    def begun(
        experience: E,
        rollouts: Rollouts,
        prompts: Sequence[Prompt],
        metrics: Metrics,
        *,
        left_out: Tensor | None = None,
    ) -> Update[E]:
        """An update of no optimizer step yet. The metrics have the ``kl`` of the rollouts."""
        return Update(
            experience=experience,
            prompts=prompts_digest(prompts),
            completions=rollouts.completions,
            rollouts=rollouts,
            left_out=left_out,
            kl=metrics["kl"],
            metrics=metrics,
        )

    def remaining(self, plan: Plan, state: PolicyState) -> Iterator[Tensor]:
        """Index tensors of the remaining minibatches. An interrupted one counts as not begun."""
        while self.passed < plan.epochs * plan.minibatches:
            epoch, part = divmod(self.passed, plan.minibatches)
            seed = derive_seed(state.seed, "minibatch", state.step, epoch)
            yield minibatches(len(self.experience.sampled.batch), plan.minibatches, seed=seed)[part]
            self.passed += 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How an update goes through its experience."""

    epochs: int
    """Epochs over the experience."""
    minibatches: int
    """Optimizer steps per epoch."""
    reduction: Reduction
    max_length: int
    """Maximum length of a completion in tokens, for the reduction ``fixed_length``."""
    optim: Optim
    measure_gap: bool
    """Whether the sampler drew from the policy's own distribution, so that its difference from the training pass can be
    measured."""
    target_kl: float = float("inf")
    """Early stopping: stop before a step once the policy is this far from its rollouts, in nats per token."""


@dataclass(frozen=True)
class Learned:
    """The result of an update."""

    metrics: Metrics
    optimizer_steps: int


def learn(
    state: PolicyState,
    update: Update[E],
    objective: Callable[[E], tuple[LossInputs, LossTerms]],
    plan: Plan,
    *,
    where: str,
    world: World,
) -> Learned:
    """Run the remaining minibatches of the update, or fewer if ``target_kl`` stops it early; none if it is complete.

    ``objective`` runs the model on some rows of the experience and returns the loss inputs and the loss of each token.
    Metrics are means over the optimizer steps taken.
    """
    scale = lr_scale(plan.optim, state.step, state.total_steps)
    for index in update.remaining(plan, state):
        part = update.experience.rows(index)
        done = accumulate_minibatch(state, part, objective, plan, world=world)
        row: Metrics = {}
        if not done.accumulated.problem:
            sampled = part.sampled
            moved_by = masked_mean(k2(done.logp - sampled.old_logp), sampled.loss_mask, across=world.sum)
            if update.taken and float(moved_by) > plan.target_kl:
                state.optimizer.zero_grad()
                update.passed = plan.epochs * plan.minibatches
                break
            if update.passed == 0:
                mask = sampled.batch.mask
                gap = logprob_gap(done.logp, sampled.sampler_logp, mask) if plan.measure_gap else {}
                update.gap = reduce(gap | routes_gap(done.routes, sampled.batch.routes, mask), world)
            row = done.metrics(world) | {"policy/approxkl": float(moved_by)}
        moved = apply(
            state.guard, state.optimizer, done.accumulated, scale=scale, config=plan.optim, where=where, world=world
        )
        if moved is not None:
            update.taken += 1
            update.rows.append(row | moved)
    return Learned(mean_of(update.rows) | update.gap | state.guard.metrics(), update.taken)


@dataclass(frozen=True)
class Minibatch:
    """The result of accumulating a minibatch's gradient; tensors are [B, T] float32, without gradient."""

    accumulated: Accumulated
    mask: Tensor
    logp: Tensor
    routes: Tensor | None
    """Of a mixture of experts: those of the training pass (:mod:`tether.models.routes`), int64."""
    figures: dict[str, Tensor]
    """Figures of the loss, by metric name."""

    def metrics(self, world: World) -> Metrics:
        """``loss``, and the mean of each figure over the emitted tokens."""
        count = float(self.mask.sum())
        figures: Figures = {"loss": Sum(self.accumulated.loss)}
        figures |= {name: Mean(float(masked_mean(x, self.mask)), count) for name, x in self.figures.items()}
        return reduce(figures, world)


def accumulate_minibatch(
    state: PolicyState,
    experience: E,
    objective: Callable[[E], tuple[LossInputs, LossTerms]],
    plan: Plan,
    *,
    world: World,
) -> Minibatch:
    """Accumulate the gradient of one minibatch; denominators are counted over all ranks before it is split."""
    mask = experience.sampled.loss_mask
    tokens, sequences = max(1, int(world.sum(mask.sum()))), world.sum(len(experience.sampled.batch))
    logp, figures = torch.zeros(mask.shape, device=mask.device), dict[str, Tensor]()
    recorded = Routes(state.policy)
    routes = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device) if recorded.routers else None

    def put(whole: Tensor, rows: Tensor, values: Tensor) -> None:
        whole[rows, : values.size(1)] = values.detach().to(whole.dtype)

    def loss_of(rows: Tensor) -> Tensor:
        micro = experience.rows(rows)
        inputs, terms = objective(micro)
        put(logp, rows, inputs.logp)
        if routes is not None and recorded.picked is not None:
            put(routes, rows, unflatten(recorded.picked, micro.sampled.batch.mask))
        for name, values in terms.figures.items():
            put(figures.setdefault(name, torch.zeros_like(logp)), rows, values)
        return reduce_loss(
            terms.loss,
            inputs.mask,
            reduction=plan.reduction,
            sequences=sequences,
            tokens=tokens,
            max_length=plan.max_length,
        )

    with recorded.recording():
        accumulated = accumulate(
            state.guard,
            state.optimizer,
            partial(micro_batches, experience.sampled.batch),
            loss_of,
            balance=Balance.of(state.policy),
            world=world,
        )
    return Minibatch(accumulated, mask, logp, None if recorded.picked is None else routes, figures)


def logprob_gap(logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> Figures:
    """Differences between the training pass and the sampler on the same tokens and weights, in nats."""
    gap = torch.where(mask, (logp - sampler_logp).abs(), torch.zeros_like(logp))
    return {
        "sampling/logprob_gap_mean": Mean(float(masked_mean(gap, mask)), float(mask.sum())),
        "sampling/logprob_gap_max": Max(float(gap.max())),
    }


def routes_gap(routes: Tensor | None, sampler_routes: Tensor | None, mask: Tensor) -> Figures:
    """The share of emitted tokens that got other experts, in any layer, in the training pass than in sampling."""
    if routes is None or sampler_routes is None:
        return {}
    differ = (routes != sampler_routes).float()
    return {"sampling/expert_gap": Mean(float(masked_mean(differ, mask)), float(mask.sum()))}
