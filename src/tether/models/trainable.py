"""The trainable part of a model, shared by the optimizer, checkpoints and weight transfer."""

from __future__ import annotations

from torch import nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once, under their first name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
