"""Activation checkpointing: a layer's activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tether.errors import ModelError
from tether.models.attention import laid_out_by


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only one hidden state per layer and token for the backward pass, for a third more arithmetic.

    transformers does this only in training mode. The mode is set on the layers themselves and not on their submodules,
    so that dropout stays off; attention by layout is set again when a layer runs a second time.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("transformers has no activation checkpointing for it", where=type(model).__name__)
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        run: Any = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, model.config)
        )
        layer._gradient_checkpointing_func = run


def _contexts(config: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass and of its recomputation. A copied model gets that of its own configuration."""
    return nullcontext(), laid_out_by(config)
