"""Matrix products in bfloat16 for a model whose weights, gradients and everything else stay float32.

Hardware with bfloat16 instructions multiplies matrices at least twice as fast in bfloat16 as in float32. Only the
operands of the products are rounded here (8 bits of mantissa: an error of at most 1 part in 256); norms, softmax,
residual sums and the optimizer use float32, so steps far below the resolution of bfloat16 still change a weight.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from tether.models.adapters import of_adapter
from tether.models.experts import routers


def round_matmuls(module: nn.Module) -> None:
    """Make every linear layer in ``module``, output head included, multiply in bfloat16, forward and backward.

    Parameters, their dtype and the state dict are unchanged; deep copies are rounded too. Layers whose weights are not
    float32 are unchanged, and so are those with a single output, a reward or a value: their product costs nothing, and
    it is the result; adapters, whose products are small, and routers of experts stay exact. Each layer keeps a rounded
    copy of its weight, which takes half as many bytes again.
    """
    count_optimizer_steps()
    exact = {layer for router in routers(module) for layer in router.modules()}
    for name, layer in module.named_modules():
        if layer in exact or of_adapter(f"{name}.weight"):
            continue
        kind, weight = ROUNDED.get(type(layer)), getattr(layer, "weight", None)
        if kind and isinstance(weight, Tensor) and weight.dtype == torch.float32 and min(weight.shape) > 1:
            layer.__class__ = kind  # in place, so that references to the layer stay valid
            layer.rounded = RoundedWeight(weight)


@functools.cache
def count_optimizer_steps() -> None:
    """Make every optimizer of the process advance the version counters of its parameters when it steps: torch's fused
    optimizers write to the parameters without doing so."""

    def move_on(optimizer: torch.optim.Optimizer, *_: object) -> None:
        increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(move_on)


def has_rounded_matmuls(module: nn.Module) -> bool:
    """Whether :func:`round_matmuls` changed anything in ``module``."""
    return any(type(layer) in ROUNDED.values() for layer in module.modules())


class RoundedWeight:
    """The bfloat16 copy of a weight, recomputed when the weight is replaced or has changed.

    Changes are detected by the weight's version counter, which ``copy_``, ``load_state_dict`` and other in-place writes
    advance; for the steps of optimizers see :func:`count_optimizer_steps`. In-place writes through ``weight.data`` are
    not detected.
    """

    def __init__(self, weight: Tensor) -> None:
        self.copy = weight.detach().bfloat16()
        self._remember(weight)

    def _remember(self, weight: Tensor) -> None:
        # A weak reference: a deep copy of this object refers to the original's weight, so the copied weight is new.
        self._source = weakref.ref(weight)
        self._state = (weight._version, weight.data_ptr())

    def of(self, weight: Tensor) -> Tensor:
        """The copy of the current weight."""
        if self._source() is not weight or self._state != (weight._version, weight.data_ptr()):
            if self.copy.shape != weight.shape or self.copy.device != weight.device:
                self.copy = torch.empty_like(weight, dtype=torch.bfloat16)
            self.copy.copy_(weight.detach())
            self._remember(weight)
        return self.copy


class Rounded:
    """A linear layer with rounded operands: x W^T + b with x and W rounded to bfloat16.

    It remains an ``nn.Linear`` or GPT-2's ``Conv1D``, with the same parameters and state dict, so that an adapter can
    wrap it. Its weight may be frozen; then only its input gets a gradient.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    rounded: RoundedWeight
    transposed = False
    """Whether the weight is stored as [in, out]."""

    def forward(self, x: Tensor) -> Tensor:
        weight, rounded = self.weight, self.rounded.of(self.weight)
        if self.transposed:
            return rounded_linear(x, weight.T, rounded.T, self.bias)
        return rounded_linear(x, weight, rounded, self.bias)


class RoundedLinear(Rounded, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` with rounded operands."""


class RoundedConv1D(Rounded, Conv1D):  # type: ignore[misc]
    """``Conv1D`` with rounded operands."""

    transposed = True


ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def rounded_linear(x: Tensor, weight: Tensor, rounded: Tensor, bias: Tensor | None) -> Tensor:
    """x rounded^T + b, with the gradients of x W^T + b: [..., in] -> [..., out], float32.

    ``weight`` [out, in] is float32, ``rounded`` its bfloat16 copy.
    """
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        out: Tensor = RoundedMatmul.apply(rows, weight, rounded)
    else:
        out = product(rows.bfloat16(), rounded.T)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], out.size(-1))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 matrices, summed and returned in float32; a CPU rounds the sums to bfloat16 in between."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


class RoundedMatmul(torch.autograd.Function):
    """y = x rounded^T for x [n, in], weight [out, in]; dx = dy rounded and dW = dy^T x, every operand rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
        x = x.bfloat16()
        ctx.save_for_backward(x if weight.requires_grad else None, rounded)
        return product(x, rounded.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, rounded = ctx.saved_tensors
        gradient = gradient.bfloat16()
        dx = product(gradient, rounded) if ctx.needs_input_grad[0] else None
        dw = product(gradient.T, x) if ctx.needs_input_grad[1] else None
        return dx, dw, None
