"""A model's attention, delegated to a layout: the layout decides what a token sees, the rest stays transformers'.

Inside ``with laid_out(model):`` every attention layer of a model passes its queries, keys and values to the object that
the forward pass was called with as ``layout=``, and no mask is made. Training packs groups this way
(:mod:`tether.models.packing`), the rollout engine reads and fills its cache this way (:mod:`tether.generation.cache`).
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
"""The supported kinds of layers in a configuration's ``layer_types``; without it, all layers are full."""


@dataclass(frozen=True)
class Layer:
    """The parameters of an attention layer."""

    index: int
    scale: float
    window: int | None
    """Keys this many positions back or further are not seen; None sees all."""
    softcap: float | None
    """Scores are bounded to +- this by a tanh; None does not bound them."""


class Layout(Protocol):
    """Decides what each token of a packed forward pass attends to."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention output [b, s, H, d] for queries [b, H, s, d] and keys and values [b, H_kv, s, d]."""
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
        raise ModelError(f"attention layers of the kind {kind} are not supported", where=type(module).__name__)
    if key.size(-1) != value.size(-1):
        raise ModelError(
            f"attention with keys of width {key.size(-1)} and values of width {value.size(-1)} is not supported",
            where=type(module).__name__,
        )
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return layout.attend(Layer(module.layer_idx, scale, sliding_window, softcap), query, key, value), None


AttentionInterface.register(NAME, _attend)


def laid_out(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Use attention by layout in the forward passes inside the block."""
    return laid_out_by(model.config)


@contextlib.contextmanager
def laid_out_by(config: Any) -> Iterator[None]:
    """:func:`laid_out` for the model with this configuration."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def is_laid_out(config: Any) -> bool:
    """Whether the forward passes of the model with this configuration use attention by layout at present."""
    return bool(config._attn_implementation == NAME)
