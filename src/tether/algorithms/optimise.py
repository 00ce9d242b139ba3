"""What every algorithm's update shares: the optimiser, its learning rate, and one guarded optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.data.batching import minibatches
from tether.errors import ConfigError, GuardError, MemoryShortError, NotFiniteError
from tether.models.memory import within_memory
from tether.seeds import derive_seed
from tether.types import Metrics

T = TypeVar("T")

REFERENCE_PARAMETERS = 7e9
"""The size of model for which each algorithm states its usual learning rate."""
LARGEST_RATE = 1e-3
"""No model is so small that it gets a larger rate unasked: Adam's own default (Kingma and Ba 2015)."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its learning rate."""

    learning_rate: float | None = None
    """Peak learning rate; unless given, the algorithm's usual one for the size of the model."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it goes from the peak to zero over the run, or stays."""
    warmup_steps: int = 0
    """Steps over which it rises from zero to the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped: int = 3
    """Stop at this many optimiser steps in a row that were skipped because loss or gradient was not finite."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "learning_rate must be positive": self.learning_rate is None or self.learning_rate > 0,
                "warmup_steps must be 0 or more": self.warmup_steps >= 0,
                "weight_decay must be 0 or more": self.weight_decay >= 0,
                "adam_beta1 and adam_beta2 must lie in [0, 1)": 0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1,
                "adam_eps must be positive": self.adam_eps > 0,
                "max_grad_norm must be positive": self.max_grad_norm > 0,
                "max_skipped must be at least 1": self.max_skipped >= 1,
            }
        )


def peak_learning_rate(config: Optim, model: PreTrainedModel, *, usual: float) -> float:
    """The configured rate, or ``usual`` * (7e9 / parameters)^0.6, at most 1e-3; ``usual`` is for 7e9 parameters.

    A small model takes, and needs, a larger rate. The exponent is a rule of thumb between two points: 1e-5, usual for
    reward models of 7e9 parameters, and 8e-4, the best found for the embedded model's 5e6 (``docs/results.md``).
    """
    if config.learning_rate is not None:
        return config.learning_rate
    parameters: int = model.num_parameters()
    return float(min(LARGEST_RATE, usual * (REFERENCE_PARAMETERS / parameters) ** 0.6))


def lr_scale(config: Optim, step: int, total_steps: int) -> float:
    """The share of the peak learning rate at step ``step`` (from 0) of ``total_steps``; above 0 at every step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = (total_steps - step) / max(1, total_steps - config.warmup_steps)
    match config.lr_schedule:
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        case "constant":
            return 1.0


def adamw(groups: Sequence[tuple[Iterable[nn.Parameter], float]], config: Optim) -> torch.optim.AdamW:
    """One parameter group for each ``(parameters, peak learning rate)``, over the trainable ones; those of less than
    full precision by their masters (:func:`master_of`).
    """
    trained = [([p for p in parameters if p.requires_grad], lr) for parameters, lr in groups]
    optimiser = torch.optim.AdamW(
        [{"params": [master_of(p) for p in weights], "lr": lr, "peak_lr": lr} for weights, lr in trained],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    rounded = [(p, master) for weights, _ in trained for p in weights if (master := master_of(p)) is not p]

    @torch.no_grad()
    def round_masters(*_: object) -> None:
        for weight, master in rounded:
            weight.copy_(master)

    optimiser.register_step_post_hook(round_masters)
    return optimiser


def master_of(weight: nn.Parameter) -> nn.Parameter:
    """What the optimiser moves in place of ``weight``: the weight itself, or a float32 copy of one in less precision.

    A bfloat16 weight of 0.02 ignores any step below 6e-5, and a second moment in bfloat16 does not decay by a
    thousandth, so training in bfloat16 alone stands still without a word. The master lies at ``weight.master`` and is
    as the weight is now; each backward pass moves its gradient there, so that micro-batches add up in float32 too.
    """
    if torch.finfo(weight.dtype).bits >= 32:
        return weight
    if not hasattr(weight, "master"):
        weight.master = nn.Parameter(weight.detach().float())  # type: ignore[attr-defined]
        weight.register_post_accumulate_grad_hook(hand_over)
    master = cast(nn.Parameter, weight.master)  # type: ignore[attr-defined]
    master.data.copy_(weight.data)
    return master


def hand_over(weight: Tensor) -> None:
    """Add the gradient of ``weight`` to its master's, and clear it."""
    master: Tensor = weight.master  # type: ignore[attr-defined]
    assert weight.grad is not None
    grad = weight.grad.float()
    master.grad = grad if master.grad is None else master.grad + grad
    weight.grad = None


def masters(module: nn.Module) -> dict[str, Tensor]:
    """The masters of a module's parameters, by the parameters' names; none where it is in full precision."""
    return {name: p.master for name, p in module.named_parameters() if hasattr(p, "master")}


def optimiser_step(optimiser: torch.optim.Optimizer, *, scale: float, max_grad_norm: float, where: str) -> Metrics:
    """Clip each group's gradient to ``max_grad_norm``, step at ``scale`` times the peak rates, clear the gradients.

    Gives ``grad_norm``, of the whole gradient before clipping, and the first group's ``learning_rate``. Raises
    :class:`NotFiniteError` where the gradient is not finite, before any weight has changed.
    """
    norms = [
        nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        for group in optimiser.param_groups
    ]
    total = float(torch.stack(norms).norm())
    if not math.isfinite(total):
        raise NotFiniteError(
            f"{where}: the gradient is not finite ({total}); lower the learning rate or the reward's scale"
        )
    for group, norm in zip(optimiser.param_groups, norms, strict=True):
        group["lr"] = group["peak_lr"] * scale
        nn.utils.clip_grads_with_norm_(group["params"], max_grad_norm, norm)
    optimiser.step()
    optimiser.zero_grad()
    return {"grad_norm": total, "learning_rate": optimiser.param_groups[0]["lr"]}


def require_finite(value: Tensor, *, what: str, where: str) -> None:
    """Raise :class:`NotFiniteError` that names ``what`` and ``where`` unless every entry of ``value`` is finite."""
    finite = torch.isfinite(value)
    if not finite.all():
        bad = int((~finite).sum())
        raise NotFiniteError(f"{where}: {what} is not finite in {bad} of {value.numel()} places")


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each figure over rows that all have the same figures; none of no rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


@dataclass(kw_only=True)
class Guard:
    """What a run's optimiser steps have been through; a part of every algorithm's state."""

    token_budget: int
    """Of one forward and backward pass: ``micro_batch_tokens``, halved whenever memory ran out."""
    taken: int = 0
    """Optimiser steps that changed the weights."""
    skipped: int = 0
    """Those that did not, because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """The latest of them."""

    def fit(self, attempt: Callable[[int], T]) -> T:
        """``attempt(token_budget)``, which begins anew with half the budget each time that memory runs out."""
        try:
            found, self.token_budget = within_memory(attempt, self.token_budget)
        except MemoryShortError as error:
            advice = "free some, or begin anew with shorter rows or --checkpoint-activations"
            raise MemoryShortError(f"{error}; {advice}") from error
        return found

    def metrics(self) -> Metrics:
        return {"skipped_updates": float(self.skipped)}

    def require_sound_end(self, where: str) -> None:
        """Raise :class:`GuardError` where the latest steps were skipped: there is no later one to show that the weights
        are sound."""
        if self.skipped_in_a_row:
            raise GuardError(
                f"{where}: the run ended on {self.skipped_in_a_row} skipped optimiser steps, whose loss or gradient "
                "was not finite, so its weights are not to be trusted; begin anew with a lower learning rate, or take "
                "more steps (--steps, --epochs or --rounds, with --allow)"
            )


def guarded_step(
    guard: Guard,
    optimiser: torch.optim.Optimizer,
    gradient: Callable[[int], T],
    *,
    scale: float,
    config: Optim,
    where: str,
) -> tuple[T, Metrics] | None:
    """One optimiser step along ``gradient``, which accumulates it for a token budget and gives its figures; they and
    :func:`optimiser_step`'s are the result.

    Where memory runs out, the gradient is computed again in smaller pieces, which add up to the same one. Where loss or
    gradient is not finite, the step is skipped: weights and optimiser stay as they are, and the result is None. Raises
    :class:`GuardError` once ``max_skipped`` steps in a row were, and at the first one of a run, which is no accident.
    """

    def anew(token_budget: int) -> T:
        optimiser.zero_grad()
        return gradient(token_budget)

    try:
        figures = guard.fit(anew)
        moved = optimiser_step(optimiser, scale=scale, max_grad_norm=config.max_grad_norm, where=where)
    except NotFiniteError as error:
        optimiser.zero_grad()
        guard.skipped += 1
        guard.skipped_in_a_row += 1
        if guard.taken == 0 or guard.skipped_in_a_row >= config.max_skipped:
            count = guard.skipped_in_a_row
            often = f"; the optimiser has skipped {count} steps in a row" if count > 1 else ""
            raise GuardError(f"{error}{often}; the run is stopped") from error
        return None
    guard.taken += 1
    guard.skipped_in_a_row = 0
    return figures, moved


E = TypeVar("E")


@dataclass(kw_only=True)
class Update(Generic[E]):
    """A policy update under way: what it learns from, and how far it has come."""

    experience: E
    metrics: Metrics
    """Of the experience."""
    passed: int = 0
    """Minibatches gone through, counted over all epochs."""
    rows: list[Metrics] = field(default_factory=list)
    """Of each optimiser step."""
    gap: Metrics = field(default_factory=dict)
    """Between the sampler's and the trainer's log-probs, at the first minibatch."""

    def remaining(self, count: int, *, epochs: int, parts: int, seed: int, step: int) -> Iterator[Tensor]:
        """The index tensors of the minibatches that are left: ``parts`` an epoch, over ``count`` rows.

        One that was left half-way, by an interruption say, counts as not begun.
        """
        while self.passed < epochs * parts:
            epoch, part = divmod(self.passed, parts)
            yield minibatches(count, parts, seed=derive_seed(seed, "minibatch", step, epoch))[part]
            self.passed += 1
