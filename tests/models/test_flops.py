"""Model FLOPs by hand, and against what torch counts when a model really runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tether.models.flops import ModelShape, attended, forward_flops, shape_of

ONE_LAYER = ModelShape(trunk=100, head=10, width=8, windows=(None,))


def test_the_tiny_llama_by_hand(tiny):
    """Width 32, 4 heads and 2 key heads of 8, inner width 48, 2 layers, 264 tokens, head tied to the embedding."""
    query = output = 32 * 32
    key = value = 32 * 16
    gate = up = down = 32 * 48
    trunk = 2 * (query + key + value + output + gate + up + down)
    assert trunk == 15_360
    shape = shape_of(AutoModelForCausalLM.from_pretrained(tiny))
    assert shape == ModelShape(trunk=trunk, head=264 * 32, width=32, windows=(None, None))
    # A prompt of 3 with completions of 2 and 1. Positions attended to: 1 + 2 + 3, then 4 + 5, then 4.
    linear = 2 * 15_360 * (3 + 2 + 1) + 2 * 264 * 32 * (2 + 1)
    attention = 2 * 4 * 32 * (6 + 9 + 4)
    assert forward_flops(shape, [(3, (2, 1))]) == linear + attention == 239_872


def test_a_prompt_counts_once_for_all_its_completions():
    together = forward_flops(ONE_LAYER, [(5, (2, 2))])
    apart = forward_flops(ONE_LAYER, [(5, (2,)), (5, (2,))])
    assert apart - together == 2 * 100 * 5 + 4 * 8 * (1 + 2 + 3 + 4 + 5)


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_positions_attended_to(window):
    for tokens in range(8):
        assert attended(tokens, window) == sum(min(i, window or i) for i in range(1, tokens + 1))


def test_layers_with_a_window(tiny_models):
    gemma, mistral = (shape_of(AutoModelForCausalLM.from_pretrained(tiny_models[n])) for n in ("gemma2", "mistral"))
    assert (gemma.windows, mistral.windows) == ((6, None), (6, 6))
    seen = sum(min(i, 6) for i in range(1, 11)) + sum(range(1, 11))
    assert forward_flops(gemma, [(10, ())]) == 2 * gemma.trunk * 10 + 4 * gemma.width * seen


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma", "gemma2", "mistral"])
def test_torch_counts_the_same_products(tiny_models, name):
    """Torch counts the whole square of the attention, also what the mask hides, and the head at every position."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name], attn_implementation="eager")
    shape, tokens = shape_of(model), 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    hidden = sum(tokens**2 - attended(tokens, window) for window in shape.windows)
    expected = forward_flops(shape, [(tokens, ())]) + 2 * shape.head * tokens + 4 * shape.width * hidden
    rotations = counter.get_total_flops() - expected
    assert 0 <= rotations < 0.002 * expected  # the angles of rotary positions are a product too


def test_a_trunk_has_no_head(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert shape_of(model.base_model).head == 0
    assert shape_of(model.base_model).trunk == shape_of(model).trunk
