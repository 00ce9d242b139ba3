"""The trainable part of a model, shared by the optimizer, checkpoints and weight transfer."""

from __future__ import annotations

from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once, under their first name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the parameters that are frozen, and what else belongs to modules of which all are (the
    scales of quantised weights): all that training can change."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    modules = dict(model.named_modules())

    def of_frozen(name: str) -> bool:
        while name not in modules:
            name = name.rpartition(".")[0]
        own = list(modules[name].parameters(recurse=False))
        return bool(own) and not any(weight.requires_grad for weight in own)

    return {name: t for name, t in model.state_dict().items() if name not in frozen and not of_frozen(name)}
