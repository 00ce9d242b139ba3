"""Mixtures of experts: their routers compute in float32, whatever the precision of the weights.

A router's scores decide which experts see a token: where two of them are close, their rounding decides. The library
rounds the scores to the precision of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model or trunk, as the library names them for recording: modules whose first result are the
    scores of the experts, [tokens, experts]."""
    named = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", ())
    recorders: list[Any] = list(named) if isinstance(named, list | tuple) else [named]
    kinds = tuple(recorder.target_class for recorder in recorders if getattr(recorder, "index", None) == 0)
    return [module for module in model.modules() if isinstance(module, kinds)]


def route_in_float32(model: nn.Module) -> None:
    """Make the routers of ``model``, and of copies of it, compute in float32. Their weights keep their precision."""
    for router in routers(model):
        if any(own_weights(layer) for layer in router.modules()):
            router.register_forward_pre_hook(widen)
            router.register_forward_hook(narrow, always_call=True)


@contextlib.contextmanager
def watched(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], active: ContextVar[T | None], watcher: T
) -> Iterator[None]:
    """Call a hook after each forward pass of its router inside, where ``active`` is ``watcher``."""
    handles = [router.register_forward_hook(hook) for router, hook in hooks]
    token = active.set(watcher)
    try:
        yield
    finally:
        active.reset(token)
        for handle in handles:
            handle.remove()


def widen(router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before its forward pass: the inputs in float32, and float32 copies where the router reads its weights."""
    for layer in router.modules():
        vars(layer).update({name: weight.float() for name, weight in own_weights(layer).items()})
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def narrow(router: nn.Module, _inputs: object, _output: object) -> None:
    """After it: the weights themselves again."""
    for layer in router.modules():
        for name in own_weights(layer):
            vars(layer).pop(name, None)


def own_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a layer, without those of the layers in it, that have less precision than float32."""
    own = dict(layer.named_parameters(recurse=False))
    return {name: w for name, w in own.items() if w.is_floating_point() and torch.finfo(w.dtype).bits < 32}
