"""The trainable part of a model, shared by the optimizer, checkpoints and weight transfer."""

from __future__ import annotations

from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once, under their first name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the parameters that are frozen: all that training can change."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
