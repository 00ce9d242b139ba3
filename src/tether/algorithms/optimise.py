"""The parts shared by all updates: the optimizer, its learning rate, gradient accumulation, and the optimizer step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ConfigError, GuardError, MemoryShortError
from tether.models.adapters import is_adapted
from tether.models.balance import Balance
from tether.models.masters import master_of, round_after_steps
from tether.models.memory import within_memory
from tether.stop_requests import stoppable
from tether.types import Metrics
from tether.world import ALONE, World

T = TypeVar("T")

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer of parameter groups, as torch's classes do: ``functools.partial(torch.optim.SGD, lr=0.01)``."""
REFERENCE_PARAMETERS = 7e9
"""The model size for which each algorithm states its usual learning rate."""
ADAPTER_RATE = 10.0
"""Rate of an adapter in units of that of all weights, about which the best ones differ whatever the model (Schulman and
Thinking Machines 2025, "LoRA without regret")."""
LARGEST_RATE = 1e-3
"""Upper bound of default learning rates, for small models: Adam's own default (Kingma and Ba 2015)."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its learning rate."""

    learning_rate: float | None = None
    """Peak learning rate. By default the algorithm's usual one times (7e9 / parameters)^0.6, at most 1e-3."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule: linear or cosine decay to zero over the run, or constant."""
    warmup_steps: int = 0
    """Steps of linear warmup from zero to the peak."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW beta1: decay rate of the first moment."""
    adam_beta2: float = 0.999
    """AdamW beta2: decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon: added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradient clipping: maximum norm. Larger gradients are scaled down to it."""
    max_skipped: int = 3
    """Stop the run after this many optimizer steps in a row were skipped because loss or gradient was not finite."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "learning_rate must be positive": self.learning_rate is None or self.learning_rate > 0,
                "warmup_steps must be 0 or more": self.warmup_steps >= 0,
                "weight_decay must be 0 or more": self.weight_decay >= 0,
                "adam_beta1 and adam_beta2 must lie in [0, 1)": 0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1,
                "adam_eps must be positive": self.adam_eps > 0,
                "max_grad_norm must be positive": self.max_grad_norm > 0,
                "max_skipped must be at least 1": self.max_skipped >= 1,
            },
        )


def peak_learning_rate(config: Optim, model: PreTrainedModel, *, usual: float) -> float:
    """The configured rate, or ``usual`` * (7e9 / parameters)^0.6, at most 1e-3; ``usual`` is for 7e9 parameters. An
    adapter has ten times that rate.

    Small models need a larger rate. The exponent is a rule of thumb from two points: 1e-5, usual for reward models with
    7e9 parameters, and 8e-4, the best found for the embedded model with 5e6 (``docs/results.md``).
    """
    if config.learning_rate is not None:
        return config.learning_rate
    parameters: int = model.num_parameters()
    rate = min(LARGEST_RATE, usual * (REFERENCE_PARAMETERS / parameters) ** 0.6)
    return float(rate * (ADAPTER_RATE if is_adapted(model) else 1.0))


def with_short_warmup(optim: Optim, total_steps: int) -> Optim:
    """``optim`` with a warmup of at most a tenth of the run: a run on few pairs would otherwise be mostly warmup."""
    return replace(optim, warmup_steps=min(optim.warmup_steps, total_steps // 10))


def lr_scale(config: Optim, step: int, total_steps: int) -> float:
    """The fraction of the peak learning rate at step ``step`` (from 0) of ``total_steps``; above 0 at every step."""
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


Trained = Sequence[tuple[Iterable[nn.Parameter], float]]
"""What is trained: parameters and their peak learning rate, one parameter group each."""


def adamw(groups: Trained, config: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of the groups.

    Parameters in less than float32 are replaced by their masters (:mod:`tether.models.masters`).
    """
    trained = [([p for p in parameters if p.requires_grad], lr) for parameters, lr in groups]
    optimizer = torch.optim.AdamW(
        [{"params": [master_of(p) for p in weights], "lr": lr, "peak_lr": lr} for weights, lr in trained],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    round_after_steps(optimizer, [p for weights, _ in trained for p in weights])
    return optimizer


def optimizer_for(
    groups: Trained, config: Optim, own: torch.optim.Optimizer | OptimizerFactory | None
) -> torch.optim.Optimizer:
    """:func:`adamw`, or one's ``own`` optimizer: any of torch's, or a function that makes one of parameter groups.

    The learning rate of each of its parameter groups is the peak of the schedule: ``lr_schedule`` and ``warmup_steps``
    of ``config`` apply to it, and so do ``max_grad_norm``, to each group by itself, and ``max_skipped``. A function is
    given the masters of parameters in less than float32. Raises :class:`ConfigError` where the optimizer has other
    parameters than those that are trained, or ``config`` has a learning rate too.
    """
    if own is None:
        return adamw(groups, config)
    if config.learning_rate is not None:
        raise ConfigError("an optimizer of your own has its own learning rate", hint="leave learning_rate out of Optim")
    weights = [[p for p in parameters if p.requires_grad] for parameters, _ in groups]
    trained = [[master_of(p) for p in group] for group in weights]
    optimizer = own if isinstance(own, torch.optim.Optimizer) else own([{"params": group} for group in trained])
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(found) != sorted(id(p) for group in trained for p in group):
        raise ConfigError(
            "the optimizer has other parameters than those that are trained: all that require a gradient, the float32 "
            "masters of those in less, and in PPO the critic's",
            hint="give a function that makes it of its parameter groups, such as "
            "functools.partial(torch.optim.SGD, lr=0.01)",
        )
    for group in optimizer.param_groups:
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ConfigError("an optimizer of your own needs a learning rate in each of its parameter groups")
        group.setdefault("peak_lr", float(group["lr"]))  # kept where the optimizer has been scheduled before
    round_after_steps(optimizer, [p for group in weights for p in group])
    return optimizer


@dataclass(kw_only=True)
class Guard:
    """A run's token budget and counts of its optimizer steps; part of every algorithm's state."""

    token_budget: int
    """Token budget of one forward and backward pass: ``micro_batch_tokens``, halved whenever memory ran out."""
    taken: int = 0
    """Optimizer steps that changed the weights."""
    skipped: int = 0
    """Optimizer steps skipped because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Optimizer steps skipped since the last one taken."""

    def fit(self, attempt: Callable[[int], T], world: World = ALONE) -> T:
        """The result of ``attempt(token_budget)``. Whenever memory runs out on any rank, all ranks restart it with half
        the budget, so ``attempt`` must make no collective calls."""
        try:
            budget = -world.max(-self.token_budget)
            found, self.token_budget = within_memory(attempt, budget, agree=world.any)
        except MemoryShortError as error:
            error.advise("free some memory, or start again with shorter rows or --checkpoint-activations")
            raise
        return found

    def metrics(self) -> Metrics:
        return {"skipped_updates": float(self.skipped)}

    def require_sound_end(self) -> None:
        """Raise :class:`GuardError` if the last steps were skipped: no later step shows that the weights are sound."""
        if self.skipped_in_a_row:
            raise GuardError(
                f"the run ended on {self.skipped_in_a_row} skipped optimizer steps, whose loss or gradient was not "
                "finite, so its weights cannot be trusted",
                hint="start again with a lower learning rate, or take more steps "
                "(--steps, --epochs or --rounds, with --allow)",
            )


@dataclass(frozen=True)
class Accumulated:
    """The result of accumulating a gradient."""

    loss: float
    """This rank's share of the loss: the sum over its micro-batches."""
    problem: str = ""
    """Why no optimizer step can be taken; empty if one can."""


def accumulate(
    guard: Guard,
    optimizer: torch.optim.Optimizer,
    parts: Callable[[int], Iterable[Tensor]],
    loss_of: Callable[[Tensor], Tensor],
    *,
    balance: Balance | None = None,
    world: World = ALONE,
) -> Accumulated:
    """Accumulate the gradient of one optimizer step, micro-batch by micro-batch, in the parameters' ``grad``.

    ``parts(token_budget)`` splits the rows into micro-batches, and ``loss_of(part)`` is a micro-batch's share of the
    loss. If memory runs out, everything is recomputed in smaller parts, which add up to the same gradient. A loss that
    is not finite, on any rank, ends the accumulation and is its ``problem``. A ``balance`` of experts is counted first,
    and its loss is part of the gradient but not of the loss that is returned.
    """

    def attempt(token_budget: int) -> Accumulated:
        optimizer.zero_grad()
        total = 0.0
        for part in stoppable(parts(token_budget)):
            loss = loss_of(part)
            if problem := not_finite(loss, what="the loss"):
                return Accumulated(total, problem)
            loss.backward()
            total += loss.item()
        return Accumulated(total)

    def count(token_budget: int) -> None:
        assert balance is not None
        with balance.counting():
            for part in stoppable(parts(token_budget)):
                loss_of(part)

    if balance is not None:
        guard.fit(count, world)
        balance.sum_over_ranks(world.sum)
    with balance.part_of_gradient() if balance is not None else contextlib.nullcontext():
        accumulated = guard.fit(attempt, world)
    if world.any(bool(accumulated.problem)) and not accumulated.problem:
        return Accumulated(accumulated.loss, "the loss is not finite on another rank")
    return accumulated


def apply(
    guard: Guard,
    optimizer: torch.optim.Optimizer,
    accumulated: Accumulated,
    *,
    scale: float,
    config: Optim,
    where: str,
    world: World = ALONE,
) -> Metrics | None:
    """Take one optimizer step with the accumulated gradient, at ``scale`` times the peak rates, and clear the gradient.

    Returns ``grad_norm``, of the whole gradient before clipping, and the first group's ``learning_rate``; each group's
    gradient is clipped to ``max_grad_norm``. If loss or gradient is not finite, the step is skipped: weights and
    optimizer are unchanged, and the result is None. Raises :class:`GuardError` once ``max_skipped`` steps in a row were
    skipped, and if a run's first step is skipped, which is unlikely to be an outlier.
    """
    problem, total, norms = accumulated.problem, math.nan, list[Tensor]()
    if not problem:
        add_over_ranks(optimizer, world)
        norms = [
            nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
            for group in optimizer.param_groups
        ]
        total = float(torch.stack(norms).norm())
        if not math.isfinite(total):
            problem = f"the gradient is not finite ({total})"
    if problem:
        optimizer.zero_grad()
        guard.skipped += 1
        guard.skipped_in_a_row += 1
        if guard.taken == 0 or guard.skipped_in_a_row >= config.max_skipped:
            count = guard.skipped_in_a_row
            often = f"; the optimizer has skipped {count} steps in a row" if count > 1 else ""
            raise GuardError(
                f"{problem}{often}; the run is stopped",
                where=where,
                hint="lower the learning rate or the reward's scale",
            )
        return None
    for group, norm in zip(optimizer.param_groups, norms, strict=True):
        group["lr"] = group["peak_lr"] * scale
        nn.utils.clip_grads_with_norm_(group["params"], config.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    guard.taken += 1
    guard.skipped_in_a_row = 0
    return {"grad_norm": total, "learning_rate": float(optimizer.param_groups[0]["lr"])}


def add_over_ranks(optimizer: torch.optim.Optimizer, world: World) -> None:
    """Sum each gradient over the ranks. Their losses have one denominator, so the sum is the whole gradient."""
    if world.size > 1:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad = world.sum(weight.grad)


def not_finite(value: Tensor, *, what: str) -> str:
    """``WHAT is not finite in n of m places``, or an empty string if every entry of ``value`` is finite."""
    finite = torch.isfinite(value)
    if finite.all():
        return ""
    return f"{what} is not finite in {int((~finite).sum())} of {value.numel()} places"


def require_finite(value: Tensor, *, what: str, where: str) -> None:
    """Raise :class:`GuardError`, naming ``what`` and ``where``, unless every entry of ``value`` is finite."""
    if problem := not_finite(value, what=what):
        raise GuardError(problem, where=where)


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each figure over rows that all have the same figures; empty without rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
