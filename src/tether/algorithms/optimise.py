"""What every algorithm's update shares: the optimiser, its learning rate, and one guarded optimiser step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ConfigError, GuardError
from tether.types import Metrics

REFERENCE_WIDTH = 4096
"""The model width, that of a 7B Llama, for which each algorithm states its usual learning rate."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its learning rate."""

    learning_rate: float | None = None
    """Peak learning rate; unless given, the algorithm's usual one times 4096 / the model's width."""
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
    """The configured rate, or ``usual`` * 4096 / width: what Adam moves in a step grows with the width (Yang et al.
    2022, arXiv 2203.03466), so that a small model takes, and needs, a larger rate. ``usual`` is for width 4096.
    """
    width: int = model.config.get_text_config().hidden_size
    return usual * REFERENCE_WIDTH / width if config.learning_rate is None else config.learning_rate


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


def adamw(modules: Sequence[tuple[nn.Module, float]], config: Optim) -> torch.optim.AdamW:
    """One parameter group for each ``(module, peak learning rate)``, over its trainable parameters."""
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr, "peak_lr": lr}
        for module, lr in modules
    ]
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
