"""The loss that balances the experts of a mixture, where ``config.json`` asks for it with ``output_router_logits``.

With p_e(t, l) the softmax of the router's scores in layer l at token t, and means over all layers and tokens of an
optimizer step,

    loss = router_aux_loss_coef * E * sum_e f_e P_e,    f_e = mean of [e is among the top k], P_e = mean of p_e

(Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, as the library has it). f has no gradient, so that a step is
counted once, in a pass of its own without gradient; then each micro-batch adds its share of P, and the gradient does
not depend on how the rows are split. A prompt counts once for each of its completions, packed or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.models.experts import routers, watched

_active: ContextVar[Balance | None] = ContextVar("balance", default=None)


class Balance:
    """The balance of one optimizer step: counted first (:meth:`counting`), then part of the gradient
    (:meth:`part_of_gradient`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers: list[nn.Module] = routers(model)
        self.coef = float(model.config.get_text_config().router_aux_loss_coef)
        self.weights: Tensor | None = None
        """Of the tokens of the present forward pass, [N]: how many rows each stands for."""
        self.counts = torch.zeros((), dtype=torch.float64, device=model.device)  # [E] once there are some
        self.total = torch.zeros((), dtype=torch.float64, device=model.device)

    @staticmethod
    def of(model: PreTrainedModel) -> Balance | None:
        """That of a model with routers whose configuration asks for the loss; None of another."""
        config = model.config.get_text_config()
        asked = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0)
        return Balance(model) if asked and routers(model) else None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the choices of the forward passes inside."""
        self.counts, self.total = torch.zeros_like(self.total), torch.zeros_like(self.total)
        with self._watching(self._count), torch.no_grad():
            yield

    def sum_over_ranks(self, sum_of: Callable[[Tensor], Tensor]) -> None:
        """Add up what the ranks counted."""
        self.counts, self.total = sum_of(self.counts), sum_of(self.total)

    @contextlib.contextmanager
    def part_of_gradient(self) -> Iterator[None]:
        """Give the backward passes of the forward passes inside the gradient of the loss too."""
        with self._watching(self._add):
            yield

    def _watching(self, hook: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
        return watched(((router, hook) for router in self.routers), _active, self)

    def _count(self, _router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        probs, weights = self._probs(output[0])
        chosen = torch.zeros_like(probs).scatter_(1, output[2], 1.0)
        self.counts = self.counts + (weights @ chosen).double()
        self.total = self.total + weights.sum().double()

    def _add(self, _router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        probs, weights = self._probs(output[0])
        share = (self.counts / self.total).float()
        loss = self.coef * probs.size(1) * (weights @ (probs @ share)) / self.total.float()
        return (output[0], Added.apply(output[1], loss), *output[2:])

    def _probs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, the probabilities of the experts [N, E], and how many rows it stands for [N]."""
        assert self.weights is not None
        return scores.float().softmax(-1), self.weights.to(scores.device, torch.float32)


class Added(torch.autograd.Function):
    """``x`` as it is; in the backward pass ``loss`` is part of what is minimised."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, _loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)


def weigh_tokens(weights: Callable[[], Tensor]) -> None:
    """Tell the balance, if one is being counted, how many rows each token of the next forward pass stands for."""
    if (balance := _active.get()) is not None:
        balance.weights = weights()
