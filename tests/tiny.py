"""Tiny models of every supported architecture, and a tokenizer of one token per byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tether.errors import ModelError
from tether.models.loading import load_policy

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCAB = 264

_ATTENTION = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_ATTENTION, "num_key_value_heads": 2, "head_dim": 8}

ARCHITECTURES = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    ),
    "gpt_neox": GPTNeoXConfig(**_ATTENTION),
    "gemma": GemmaConfig(**_GROUPED),
    "gemma2": Gemma2Config(**_GROUPED, sliding_window=6, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**_GROUPED, sliding_window=6),
}  # fmt: skip
"""gemma2 has soft-capped logits; the windows of mistral and gemma2 are shorter than the tests' sequences."""


def byte_tokenizer(template: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte; ``<s>`` is put in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if template:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
            "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return tokenizer


def make_model(directory: Path, architecture: str = "llama", *, seed: int = 0, template: bool = False) -> str:
    """A randomly initialised model and the byte tokenizer in ``directory``."""
    return make_model_of(directory, ARCHITECTURES[architecture], seed=seed, template=template)


def make_model_of(directory: Path, config, *, seed: int = 0, template: bool = False) -> str:
    """The same for any configuration."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer(template).save_pretrained(directory)
    return str(directory)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(directory, message) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(str(directory))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{directory}: ")
