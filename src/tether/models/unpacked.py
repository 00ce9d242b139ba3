"""Models whose rows cannot share a pass: padded on the right, each row by the model's own attention.

An architecture that does not take its attention from :mod:`tether.models.attention` (GPT-J, BLOOM), or that keeps
another state than keys and values (Mamba), is computed in this way. It is exact where a token depends on no later one,
and slower: a prompt is computed once for each of its completions.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


def is_unpacked(model: nn.Module) -> bool:
    """Whether the rows of this model, or of this trunk, are padded and not packed."""
    trunk = model.base_model if isinstance(model, PreTrainedModel) else model
    return bool(getattr(trunk, "tether_unpacked", False))


def set_unpacked(model: PreTrainedModel, value: bool) -> None:
    """Compute the rows of the model, and of copies of it, padded from now on; or packed."""
    cast(Any, model.base_model).tether_unpacked = value


def unpacked_words(model: nn.Module) -> str:
    """What a person is told of such a model; "" of another."""
    if not is_unpacked(model):
        return ""
    return (
        f"{type(model).__name__} is computed without sharing prompts between their completions, which takes longer "
        "(docs/models.md)"
    )
