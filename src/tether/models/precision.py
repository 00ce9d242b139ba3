"""Matrix products in bfloat16 for a model whose weights, gradients and everything else stay float32.

Hardware with instructions for bfloat16 multiplies matrices in it two and more times as fast as in float32. Only the
operands of the products are rounded here (8 bits of mantissa: to 1 part in 256 at most); norms, softmax, residual sums
and the optimiser see float32, and a weight still takes steps far smaller than a bfloat16 of its size could.
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


def round_products(module: nn.Module) -> None:
    """Let every linear layer in ``module``, output head included, multiply in bfloat16, forward and backward.

    Parameters, their dtype and the state dict are as before; deep copies are rounded too. Layers whose weights are not
    float32 are left as they are, and so are those that give one number, a reward or a value: their product costs
    nothing, and it is the result. Each layer keeps a rounded copy of its weight, half as many bytes again.
    """
    count_optimiser_steps()
    for layer in module.modules():
        kind, weight = ROUNDED.get(type(layer)), getattr(layer, "weight", None)
        if kind and isinstance(weight, Tensor) and weight.dtype == torch.float32 and min(weight.shape) > 1:
            layer.__class__ = kind  # the layer itself, whatever refers to it
            layer.rounded = RoundedWeight(weight)  # type: ignore[assignment]


@functools.cache
def count_optimiser_steps() -> None:
    """Let every optimiser of the process move the version counters of its parameters on when it steps: those of torch
    that are fused write into the parameters past the counters."""

    def move_on(optimiser: torch.optim.Optimizer, *_: object) -> None:
        increment_version([p for group in optimiser.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(move_on)


def has_rounded_products(module: nn.Module) -> bool:
    """Whether :func:`round_products` changed anything in ``module``."""
    return any(type(layer) in ROUNDED.values() for layer in module.modules())


class RoundedWeight:
    """The bfloat16 copy of a weight, made anew when the weight is another one or has changed since.

    A change is seen by the weight's version counter, which ``copy_``, ``load_state_dict`` and whatever else writes in
    place move on, and an optimiser's step by :func:`count_optimiser_steps`. What writes in place through
    ``weight.data`` goes unseen.
    """

    def __init__(self, weight: Tensor) -> None:
        self.copy = weight.detach().bfloat16()
        self._remember(weight)

    def _remember(self, weight: Tensor) -> None:
        # A weak reference: a deep copy of this object knows the original's weight, so the copied weight is new to it.
        self._source = weakref.ref(weight)
        self._state = (weight._version, weight.data_ptr())

    def of(self, weight: Tensor) -> Tensor:
        """The copy as the weight is now."""
        if self._source() is not weight or self._state != (weight._version, weight.data_ptr()):
            if self.copy.shape != weight.shape or self.copy.device != weight.device:
                self.copy = torch.empty_like(weight, dtype=torch.bfloat16)
            self.copy.copy_(weight.detach())
            self._remember(weight)
        return self.copy


class RoundedLinear(nn.Linear):
    """x W^T + b with x and W rounded to bfloat16."""

    rounded: RoundedWeight

    def forward(self, input: Tensor) -> Tensor:
        return rounded_linear(input, self.weight, self.rounded.of(self.weight), self.bias)


class RoundedConv1D(Conv1D):
    """The same for GPT-2's linear layer, whose weight is stored as [in, out]."""

    rounded: RoundedWeight

    def forward(self, x: Tensor) -> Tensor:
        return rounded_linear(x, self.weight.T, self.rounded.of(self.weight).T, self.bias)


ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def rounded_linear(x: Tensor, weight: Tensor, rounded: Tensor, bias: Tensor | None) -> Tensor:
    """x rounded^T + b, with the gradients of x W^T + b: [..., in] -> [..., out], float32.

    ``weight`` [out, in] is float32, ``rounded`` its bfloat16 copy.
    """
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        out: Tensor = RoundedProduct.apply(rows, weight, rounded)
    else:
        out = product(rows.bfloat16(), rounded.T)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], out.size(-1))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 matrices, summed in float32 and given as float32; a CPU's product rounds the sums on the way."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


class RoundedProduct(torch.autograd.Function):
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
