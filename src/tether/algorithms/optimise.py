"""What every algorithm's update shares: the optimiser, its learning rate, and one guarded optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ConfigError, GuardError
from tether.types import Metrics

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

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "learning_rate must be positive": self.learning_rate is None or self.learning_rate > 0,
                "warmup_steps must be 0 or more": self.warmup_steps >= 0,
                "weight_decay must be 0 or more": self.weight_decay >= 0,
                "adam_beta1 and adam_beta2 must lie in [0, 1)": 0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1,
                "adam_eps must be positive": self.adam_eps > 0,
                "max_grad_norm must be positive": self.max_grad_norm > 0,
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
    :class:`GuardError` where the gradient is not finite, before any weight has changed.
    """
    norms = [
        nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        for group in optimiser.param_groups
    ]
    total = float(torch.stack(norms).norm())
    if not math.isfinite(total):
        optimiser.zero_grad()
        raise GuardError(
            f"{where}: the gradient is not finite ({total}); lower the learning rate or the reward's scale"
        )
    for group, norm in zip(optimiser.param_groups, norms, strict=True):
        group["lr"] = group["peak_lr"] * scale
        nn.utils.clip_grads_with_norm_(group["params"], max_grad_norm, norm)
    optimiser.step()
    optimiser.zero_grad()
    return {"grad_norm": total, "learning_rate": optimiser.param_groups[0]["lr"]}


def require_finite(value: Tensor, *, what: str, where: str) -> None:
    """Raise :class:`GuardError` that names ``what`` and ``where`` unless every entry of ``value`` is finite."""
    finite = torch.isfinite(value)
    if not finite.all():
        bad = int((~finite).sum())
        raise GuardError(f"{where}: {what} is not finite in {bad} of {value.numel()} places; the run is stopped")


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each figure over rows that all have the same figures."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
