"""float32 master weights of lower-precision weights: the optimizer updates them in their place.

A bfloat16 weight of 0.02 ignores any step below 6e-5, and a second moment in bfloat16 does not decay by a thousandth,
so training in pure bfloat16 stalls without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tether.models.trainable import trainable

BLOCK = 4096
"""Rows of a gradient that are added at a time."""


def master_of(weight: nn.Parameter) -> nn.Parameter:
    """What the optimizer updates for ``weight``: the weight itself, or a float32 copy if it has lower precision.

    The master is ``weight.master`` and is set to the current weight. Each backward pass moves the gradient to the
    master, so that micro-batches add up in float32 too.
    """
    if torch.finfo(weight.dtype).bits >= 32:
        return weight
    if not hasattr(weight, "master"):
        weight.master = nn.Parameter(weight.detach().float())  # type: ignore[attr-defined]
        weight.register_post_accumulate_grad_hook(_hand_over)
    master = cast(nn.Parameter, weight.master)  # type: ignore[attr-defined]
    master.data.copy_(weight.data)
    return master


def _hand_over(weight: Tensor) -> None:
    """Add the gradient of ``weight`` to its master's, and clear it."""
    master: Tensor = weight.master  # type: ignore[attr-defined]
    assert weight.grad is not None
    grad, weight.grad = weight.grad, None  # first, so that it does not count twice where memory runs out below
    if master.grad is None:
        master.grad = grad.float()
    else:
        # in place and by rows, for which a sum of two dtypes has a copy: a head in chunks hands over a gradient of its
        # whole size for each chunk
        for rows in range(0, len(grad), BLOCK):
            master.grad[rows : rows + BLOCK].add_(grad[rows : rows + BLOCK])


def round_after_steps(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> None:
    """After each of the optimizer's steps, copy masters back into the ``weights`` that have one."""
    rounded = [(weight, master) for weight in weights if (master := master_of(weight)) is not weight]

    @torch.no_grad()
    def copy_back(*_: object) -> None:
        for weight, master in rounded:
            weight.copy_(master)

    optimizer.register_step_post_hook(copy_back)


def masters(module: nn.Module) -> dict[str, Tensor]:
    """The masters of a module's parameters, by the parameters' names; empty if it is in full precision."""
    return {name: weight.master for name, weight in trainable(module).items() if hasattr(weight, "master")}
