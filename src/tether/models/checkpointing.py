"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of kept."""

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
    """Keep one hidden state a layer and token for the backward pass, for a third more arithmetic.

    transformers does this in training mode alone. The mode is set on the layers themselves, and not on what is in them,
    so that dropout stays off; and attention by layout is set again where a layer is run a second time.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__}: transformers knows no activation checkpointing for it")
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        run: Any = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, model.config)
        )
        layer._gradient_checkpointing_func = run


def _contexts(config: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass, and around its repetition. A copy of the model, configuration and all, gets a copy."""
    return nullcontext(), laid_out_by(config)
