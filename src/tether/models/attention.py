"""A model's attention, handed to a layout: what a token sees is the layout's business, the rest stays transformers'.

Inside ``with laid_out(model):`` every attention layer of a model gives its queries, keys and values to the object that
the forward pass was called with as ``layout=``, and no mask is made. Training packs groups that way
(:mod:`tether.models.packing`), the rollout engine reads and fills its cache that way (:mod:`tether.generation.cache`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from tether.errors import ModelError

NAME = "tether"
FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers in a configuration's ``layer_types`` that are known; where it states none, they are full."""


@dataclass(frozen=True)
class Layer:
    """What an attention layer asks for."""

    index: int
    scale: float
    window: int | None
    """Keys this far back and further are out of sight."""
    softcap: float | None
    """Scores are squashed into +- this by a tanh."""


class Layout(Protocol):
    """Says what each token of a packed forward pass attends to."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention's output [b, s, H, d] for queries [b, H, s, d] and keys and values [b, H_kv, s, d]."""
        ...


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else FULL
    if kind != FULL and (kind != SLIDING or sliding_window is None):
        raise ModelError(f"{type(module).__name__}: tether does not know what a layer of {kind} sees")
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return layout.attend(Layer(module.layer_idx, scale, sliding_window, softcap), query, key, value), None


AttentionInterface.register(NAME, _attend)


def laid_out(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Attention by layout for the forward passes inside."""
    return laid_out_by(model.config)


@contextlib.contextmanager
def laid_out_by(config: Any) -> Iterator[None]:
    """The same for the model of this configuration."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
