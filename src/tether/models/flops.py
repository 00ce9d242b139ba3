"""Model FLOPs: the arithmetic that a pass over some tokens needs, whatever the implementation.

The multiplications and additions of matrix products are counted, as in Chowdhery et al. 2022 (arXiv 2204.02311,
appendix B); norms, activations, softmaxes and embedding lookups are not. A backward pass is twice a forward pass. Extra
work of an implementation (padding, a prompt repeated per completion, activations recomputed in the backward pass) does
not count, so that a faster implementation has a higher utilisation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Lengths = Iterable[tuple[int, Sequence[int]]]
"""Per prompt: its length, and the lengths of its completions, in tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the FLOPs of a transformer depend on."""

    trunk: int
    """Weights of the linear layers below the output head."""
    head: int
    """Weights of the output head, tied to the embedding or not; 0 without one."""
    width: int
    """Number of attention heads times their dimension."""
    windows: tuple[int | None, ...]
    """Number of positions that each layer's attention sees; None is all."""


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, or of a trunk without head. A scalar head is left out: it has one row of weights."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    head = model.get_output_embeddings()
    return ModelShape(
        trunk=sum(weights_of(part) for part in model.base_model.modules() if isinstance(part, nn.Linear | Conv1D)),
        head=0 if head is None else cast(nn.Linear, head).weight.numel(),
        width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def weights_of(layer: nn.Linear | Conv1D) -> int:
    """The number of weights of a linear layer, packed into fewer numbers or not."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def forward_flops(shape: ModelShape, lengths: Lengths) -> float:
    """Model FLOPs of one forward pass that gives the log-prob of every completion token:

        2 trunk N + 2 head R + sum over layers of 4 width C

    N: tokens, each prompt's once for all its completions. R: completion tokens, the only ones that need the head. C:
    the positions that a token attends to, itself included, summed over tokens; 4 = a product and a sum for the scores,
    and for the mean of the values.
    """
    layers = Counter(shape.windows).items()
    total = 0
    for prompt, completions in lengths:
        read = sum(completions)
        total += 2 * shape.trunk * (prompt + read) + 2 * shape.head * read
        for window, count in layers:
            before = attended(prompt, window)
            after = sum(attended(prompt + length, window) - before for length in completions)
            total += 4 * shape.width * count * (before + after)
    return float(total)


def training_factor(model: PreTrainedModel) -> float:
    """Model FLOPs of a forward and a backward pass, in forward passes: 1, as much again for the gradient of the layers'
    inputs, and for that of the weights the share of the linear ones that is trained; 3 without an adapter."""
    layers = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D)]
    trained = sum(weights_of(layer) for layer in layers if layer.weight.requires_grad)
    return 2.0 + trained / max(1, sum(map(weights_of, layers)))


def training_flops(model: PreTrainedModel, lengths: Lengths) -> float:
    """Model FLOPs of a forward and a backward pass."""
    return training_factor(model) * forward_flops(shape_of(model), lengths)


def attended(tokens: int, window: int | None) -> int:
    """Positions seen by tokens 1..n under causal attention: sum over i of min(i, window)."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full
