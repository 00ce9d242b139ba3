"""Activation checkpointing: a layer's activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tether.errors import ModelError
from tether.models.attention import is_laid_out, laid_out_by


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only one hidden state per layer and token for the backward pass, for a third more arithmetic.

    transformers does this only in training mode. The mode is set on the layers themselves and not on their submodules,
    and is off again while a layer runs, so that its own dropout stays off. A layer that runs a second time has the
    attention and the adapter's dropout of the first time.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("transformers has no activation checkpointing for it", where=type(model).__name__)
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        run: Any = partial(_run, layer, model.config)  # of which a copied model has a copy, with its own layer
        layer._gradient_checkpointing_func = run


def _run(layer: nn.Module, config: Any, forward: Callable[..., Any], *inputs: Any) -> Any:
    """The checkpointed ``forward`` of a layer."""

    def without_dropout(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), laid_out_by(config) if is_laid_out(config) else nullcontext()

    drops = any(isinstance(part, nn.Dropout) and part.training and part.p for part in layer.modules())
    return checkpoint(without_dropout, *inputs, use_reentrant=False, preserve_rng_state=drops, context_fn=contexts)
