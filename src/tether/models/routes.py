"""The experts that each token of a mixture got, so that sampling and training can be compared.

Sampling and training round differently, and where two experts' scores are close, rounding decides: the token then sees
other experts in training than it was sampled with. A token's route is one number that stands for the experts of all
layers: with h(l, e) a random number of 62 bits for each layer and expert,

    route = sum over layers l, and experts e chosen in l, of h(l, e)    (modulo 2^64)

Equal choices give equal routes, in whatever order, and different ones give different routes but for one chance in 2^62.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from tether.models.experts import routers, watched

_active: ContextVar[Routes | None] = ContextVar("routes", default=None)


class Routes:
    """Records the routes of a model's forward passes, while :meth:`recording`."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers(model)
        self.by_layer: dict[int, Tensor] = {}
        """The sum over the chosen experts of each layer, [N] int64, since they were last taken."""
        self.picked: Tensor | None = None
        """Those that :func:`pick_routes` chose in the last forward pass."""

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Record the forward passes inside; nothing in a model without routers."""
        hooks = ((router, partial(self._record, layer)) for layer, router in enumerate(self.routers))
        return watched(hooks, _active, self)

    def take(self) -> Tensor | None:
        """The routes of the tokens of the last forward pass, [N] int64, in the order of its inputs; None where no
        router ran since they were last taken."""
        found, self.by_layer = self.by_layer, {}
        return torch.stack([x.to(found[0].device) for x in found.values()]).sum(0) if found else None

    def _record(self, layer: int, _router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        scores, chosen = output[0], output[2]
        self.by_layer[layer] = numbers(layer, scores.size(1)).to(chosen.device)[chosen].sum(1)


def numbers(layer: int, experts: int) -> Tensor:
    """h(layer, e) of each expert, [E] int64."""
    return torch.randint(2**62, (experts,), generator=torch.Generator().manual_seed(layer))


def pick_routes(places: Callable[[Tensor], Tensor]) -> None:
    """Where routes are recorded, keep those that ``places`` takes from the ones of the last forward pass."""
    if (routes := _active.get()) is not None and (found := routes.take()) is not None:
        routes.picked = places(found)
