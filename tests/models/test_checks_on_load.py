"""Models are compared with the library's own forward pass when they are loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from tether.errors import GuardError, ModelError
from tether.generation.cache import Pool
from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models import checks
from tether.models.checks import check_packing, check_policy, context_length, thresholds
from tether.models.loading import (
    load_policy,
    load_pretrained,
)
from tether.models.packing import GroupLayout
from tether.models.policy import completion_logprobs, completion_states, padded_states
from tether.models.reward import new_reward_model
from tether.models.unpacked import is_unpacked, set_unpacked
from tether.types import Batch, Prompt, Sampling, make_requests
from tiny import byte_tokenizer, refused

IDS = torch.tensor([[0, 5, 9, 200, 31, 1]])


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip
UNPACKED = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "num_key_value_heads": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "bloom": {"n_layer": 2, "n_head": 4, "seq_length": 128},
    "falcon": {"alibi": True, "multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 4},
}
"""Architectures that attend or share keys in ways of their own, at toy size."""
WORK = {
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 9},
    "olmo2": {"num_key_value_heads": 2},
}


def make_other(directory: Path, kind: str, changes: dict) -> str:
    """A toy model of this kind, whose biases and sinks are not zero."""
    sizes = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2,
    }  # fmt: skip
    if kind == "gptj":
        sizes = {name: sizes[name] for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | changes))
    for name, weight in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", UNPACKED)
def test_what_does_not_pack_is_padded_and_exact(kind, tmp_path):
    name = make_other(tmp_path, kind, UNPACKED[kind])
    model, tokenizer = load_policy(name)
    assert is_unpacked(model)
    assert is_unpacked(copy.deepcopy(model))
    rows = [((5, 6, 7) * 9, (8, 9, 10, 11)), ((5, 6, 7) * 9, (12, 9)), ((40,), (41, 42))]
    with torch.no_grad():
        (found,) = completion_logprobs(model, Batch.collate(rows), temperature=1.0)
        for row, (prompt, completion) in enumerate(rows):
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
            known = [logits[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
            torch.testing.assert_close(found[row, : len(completion)], torch.stack(known), rtol=1e-3, atol=1e-4)
    prompts = [Prompt(ids=(5, 6, 7), text=""), Prompt(ids=(9,), text="")]
    asked, sampling = make_requests(prompts, group_size=3, seed=0), Sampling(max_new_tokens=6)
    found, expected = (
        [[c.ids for c in group.completions] for group in kind(model, tokenizer).generate(asked, sampling=sampling)]
        for kind in (Engine, NaiveGenerator)
    )
    assert found == expected
    judge, _ = new_reward_model(name, seed=0)
    assert is_unpacked(judge)


def test_padded_sampling_stops_where_the_weights_have_diverged(tiny):
    model, tokenizer = load_policy(tiny)
    set_unpacked(model, True)
    engine = Engine(model, tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    asked = make_requests([Prompt(ids=(0, 5), text="")], group_size=2, seed=0)
    with pytest.raises(GuardError, match="the logits are not finite; the policy's weights have diverged"):
        engine.generate(asked, sampling=Sampling(max_new_tokens=3))


def test_longrope_is_packed_up_to_its_original_context(tmp_path):
    """Beyond it the library turns all rows of a pass otherwise, so no row may be longer."""
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40, "num_key_value_heads": 2}
    model, _ = load_policy(make_other(tmp_path, "phi3", changes))
    assert not is_unpacked(model)
    assert context_length(model) == 40
    assert model.config.max_position_embeddings == 128


def test_longrope_with_one_factor_is_exact_in_the_whole_context(tmp_path):
    """With ``long_factor`` in both places, rows on both sides of the original context are the library's."""
    rope = LONGROPE | {"short_factor": LONGROPE["long_factor"]}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 40, "num_key_value_heads": 2}
    model, tokenizer = load_policy(make_other(tmp_path, "phi3", changes))
    assert not is_unpacked(model)
    assert context_length(model) == 128
    rows = [((5, 6, 7) * 12, (8, 9, 10, 11, 40, 41, 42)), ((5, 6, 7) * 12, (12, 9)), ((40,), (41, 42))]
    with torch.no_grad():
        (found,) = completion_logprobs(model, Batch.collate(rows), temperature=1.0)
        for row, (prompt, completion) in enumerate(rows):
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
            known = [logits[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
            torch.testing.assert_close(found[row, : len(completion)], torch.stack(known), rtol=1e-3, atol=1e-4)
    asked = make_requests([Prompt(ids=(5, 6, 7) * 12, text="")], group_size=2, seed=0)
    sampled, expected = (
        [[c.ids for c in group.completions] for group in kind(model, tokenizer).generate(
            asked, sampling=Sampling(max_new_tokens=9)
        )]
        for kind in (Engine, NaiveGenerator)
    )  # fmt: skip
    assert sampled == expected


def test_a_model_that_sees_later_tokens_is_refused(tiny, monkeypatch):
    """Neither packed nor padded: its rows depend on what is beside them."""
    forward = LlamaModel.forward

    def whole_row(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(LlamaModel, "forward", whole_row)
    refused(tiny, "mixes tokens otherwise than by attention that tether knows")


@pytest.mark.parametrize("kind", WORK)
def test_what_packs_beyond_its_windows_is_taken(kind, tmp_path):
    name = make_other(tmp_path, kind, WORK[kind])
    model, tokenizer = load_policy(name)
    Engine(model, tokenizer)
    new_reward_model(name, seed=0)
    batch = Batch.collate([((5, 6, 7) * 9, (8, 9, 10, 11)), ((5, 6, 7) * 9, (12, 9)), ((40,), (41, 42))])
    with torch.no_grad():
        torch.testing.assert_close(
            completion_states(model.base_model, batch), padded_states(model.base_model, batch), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    "stated", ["sliding_window", "attention_chunk_size", "original_max_position_embeddings", "local_attention"]
)
def test_every_length_that_a_configuration_names_is_crossed(tiny, stated):
    model, _ = load_policy(tiny)
    assert thresholds(model) == []
    setattr(model.config, stated, 37)
    assert thresholds(model) == [37]
    setattr(model.config, stated, 4096)  # beyond the context
    assert thresholds(model) == []
    setattr(model.config, stated, {"full_attention": {stated: 21}})
    assert thresholds(model) == [21]
    model.config.max_window_layers = model.config.num_local_experts = 9  # which are no lengths
    assert thresholds(model) == [21]


@pytest.fixture
def windowless(tiny_models, monkeypatch):
    """A model with a window of 6, and a pack that does not keep it."""
    attend = GroupLayout.attend
    monkeypatch.setattr(
        GroupLayout, "attend", lambda self, layer, *qkv: attend(self, replace(layer, window=None), *qkv)
    )
    return load_pretrained(AutoModelForCausalLM, tiny_models["mistral"], dtype=torch.float32)


def test_a_window_is_found_at_its_own_length(windowless):
    """The short comparison agrees and the one across the window does not."""
    windowless.config.sliding_window = 20
    with pytest.raises(
        ModelError, match=r"mixes tokens otherwise than by attention that tether knows \(at 23 tokens\)"
    ):
        check_packing(windowless)
    check_policy("mistral", windowless)
    assert is_unpacked(windowless)


def test_lengths_that_cost_too_much_are_left_out(windowless, monkeypatch):
    monkeypatch.setattr(checks, "AFFORDABLE", 2.0 * windowless.num_parameters() * 17)
    windowless.config.sliding_window = 6
    with pytest.raises(ModelError, match="at 7 tokens"):  # the shortest comparison is never left out
        check_packing(windowless)
    windowless.config.sliding_window = 20
    check_packing(windowless)


def test_a_reward_model_that_reads_its_score_elsewhere_is_refused(tiny, monkeypatch):
    model, _ = new_reward_model(tiny, seed=0)
    forward = type(model).forward

    def first_token(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + 1
        return out

    monkeypatch.setattr(type(model), "forward", first_token)
    with pytest.raises(ModelError, match="reads its score otherwise than from the last token's last hidden state"):
        new_reward_model(tiny, seed=0)


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), AttributeError("x"), IndexError(), ZeroDivisionError("0")])
def test_whatever_a_forward_pass_raises_is_one_line(tiny, monkeypatch, error):
    def broken_forward(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(LlamaModel, "forward", broken_forward)
    with pytest.raises(ModelError, match=r"Llama\w+ is not built as tether needs it \(\w+\)$") as caught:
        load_policy(tiny)
    assert "\n" not in str(caught.value)
    assert caught.value.where == tiny


def test_an_engine_that_decodes_something_else_is_refused(tiny_models, monkeypatch):
    """Keys that are stored one place off: the packed pass does not see it, decoding does."""
    model, tokenizer = load_policy(tiny_models["llama"])
    cached = Pool.of

    def one_off(self, *args, **places):
        keys, values = cached(self, *args, **places)
        return keys.roll(1, dims=2), values

    monkeypatch.setattr(Pool, "of", one_off)
    with pytest.raises(ModelError, match="gives other log-probs when it is decoded token by token"):
        Engine(model, tokenizer)
