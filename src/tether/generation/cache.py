"""A key-value cache that grows in place.

transformers' dynamic cache concatenates its whole content for every token. This one writes into a buffer of the final
length, which the engine knows beforehand, and hands attention a view of the filled part.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """One layer's keys and values, [B, heads, capacity, head_dim], of which the first ``filled`` positions are real.

    It is never sliding: a model with sliding-window layers keeps all its keys and masks those out of reach.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.capacity)
            self.buffers = (
                key_states.new_empty(*shape, key_states.size(3)),
                value_states.new_empty(*shape, value_states.size(3)),
            )
        end = self.filled + key_states.size(2)
        self.buffers[0][:, :, self.filled : end] = key_states
        self.buffers[1][:, :, self.filled : end] = value_states
        self.filled = end
        return self._view()

    def select_rows(self, rows: Tensor) -> None:
        """Keep the cache rows at ``rows``, in that order, repeats allowed; the others' memory is freed."""
        assert self.buffers is not None
        kept = []
        for buffer in self.buffers:
            kept.append(buffer.new_empty(rows.size(0), *buffer.shape[1:]))
            kept[-1][:, :, : self.filled] = buffer[rows, :, : self.filled]
        self.buffers = (kept[0], kept[1])
        self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        """The filled part, which transformers looks for in ``keys`` and ``values``."""
        assert self.buffers is not None
        keys, values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


class BufferedCache(Cache):
    """A :class:`BufferedLayer` for each of the model's layers."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        layers = model.config.get_text_config().num_hidden_layers
        self.buffered = [BufferedLayer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self.buffered))

    def select_rows(self, rows: Tensor) -> None:
        for layer in self.buffered:
            layer.select_rows(rows)
