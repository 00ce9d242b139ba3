"""Frozen weights of 4 or 8 bits, through bitsandbytes, which is imported where it is used: the extra ``quantise``.

Linear layers but the output head are stored in blocks of 4-bit numbers (NF4, Dettmers et al. 2023, arXiv 2305.14314,
with the scales quantised too) or in 8 bits (LLM.int8, Dettmers et al. 2022, arXiv 2208.07339), and multiply in the
dtype of the model. Only an adapter can be trained on them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any, Literal, cast

import torch
from torch import nn

from tether.errors import ConfigError, ModelError

Quantise = Literal["none", "4bit", "8bit"]
LARGEST_ERROR = 0.15
"""Of NF4 for normal weights it is 0.09 of their norm."""
HEADS = ["lm_head", "embed_out", "score"]
"""Layers that stay as they are: their product is the result."""


def quantisation(kind: Quantise, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What ``from_pretrained`` is given to load weights in this kind. Raises :class:`ConfigError` where bitsandbytes is
    not installed."""
    if kind == "none":
        return {}
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"weights of {kind} need the package {missing[0]}",
            where="--quantise",
            hint="pip install 'tether-rlhf[quantise]'",
        )
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        if kind == "4bit"
        # Without a threshold a row does not depend on the outliers of the others, nor a sample on its batch.
        else {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    )
    return {
        "quantization_config": BitsAndBytesConfig(**options, llm_int8_skip_modules=HEADS),
        "device_map": {"": str(device)},
    }


def import_bitsandbytes() -> None:
    """Import it without the package ``kernels``, with which it would fetch compiled code from the hub and run it, and
    without its remarks about that and about each product."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    loaded = sys.modules.get("kernels")
    sys.modules["kernels"] = cast(Any, None)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        if loaded is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = loaded


def settle_products(model: nn.Module) -> None:
    """Give each layer one way to multiply: on some CPUs bitsandbytes rearranges 4-bit weights when it first computes
    without a gradient, and then samples with other products than it trains with."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def check_blocks(model: nn.Module) -> None:
    """Raise :class:`ModelError` where 4-bit weights of a layer's width do not come back as what they were, within the
    error of the format: bitsandbytes 0.50 confuses the blocks on CPUs where a row is not a whole number of them."""
    if kind_of(model) != "4bit":
        return
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for width, device in {(layer.in_features, layer.weight.device) for layer in four_bit_layers(model)}:
        exact = torch.randn(64, width, device=device, generator=torch.Generator(device).manual_seed(0))
        packed, state = quantize_4bit(exact, quant_type="nf4", compress_statistics=True)
        error = float((dequantize_4bit(packed, state) - exact).norm() / exact.norm())
        if not error < LARGEST_ERROR:
            raise ModelError(
                f"bitsandbytes does not give back 4-bit weights of width {width} on {device.type} (they differ by "
                f"{error:.0%})",
                hint="use --quantise 8bit",
            )


def four_bit_layers(model: nn.Module) -> list[nn.Linear]:
    from bitsandbytes.nn import Linear4bit

    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def kind_of(model: nn.Module) -> Quantise:
    """How the weights of the model were loaded."""
    if getattr(model, "quantization_method", None) is None:
        return "none"
    found: Any = model.config
    return "4bit" if found.quantization_config.load_in_4bit else "8bit"


def is_quantised(model: nn.Module) -> bool:
    return kind_of(model) != "none"
