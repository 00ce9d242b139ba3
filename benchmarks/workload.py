"""The inputs of both sides, in a directory: models with random weights, prompts of real words, preference pairs."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from benchmarks.flops import Shape
from tether.models.loading import BASE, resolve


def config_of(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    return (Qwen2Config if shape.qwen else LlamaConfig)(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_models(folder: Path, shape: Shape) -> tuple[str, str, PreTrainedTokenizerBase]:
    """A policy and a reward model of ``shape``, and the embedded model's tokenizer: ``(policy, reward, tokenizer)``."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(BASE), model_max_length=shape.context, trust_remote_code=False)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config_of(shape, tokenizer), dtype=torch.float32)
    config = config_of(shape, tokenizer)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "policy"), str(folder / "reward"), tokenizer


def write_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> str:
    """Prompts of exactly ``lengths`` tokens, BOS included: random words of one token each."""
    start = "Ġ"  # how byte-level tokenizers write the space before a word
    words = sorted(w[1:] for w in tokenizer.get_vocab() if w[:1] == start and len(w) > 3 and w[1:].isalpha())
    front = len(tokenizer("")["input_ids"])
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            text = "".join(" " + rng.choice(words) for _ in range(length - front))
            if len(tokenizer(text)["input_ids"]) != length:
                raise ValueError(f"not {length} tokens: {text[:60]!r}")
            file.write(json.dumps({"prompt": text}) + "\n")
    return str(path)


def around(mean: int, count: int) -> list[int]:
    """``count`` lengths spread evenly over a third of the mean on either side of it."""
    return [mean - mean // 3 + round(2 * (mean // 3) * i / max(1, count - 1)) for i in range(count)]


def write_pairs(
    path: Path, data: Path, tokenizer: PreTrainedTokenizerBase, *, count: int, max_length: int
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """The first ``count`` HH pairs whose sides have at most ``max_length`` tokens, EOS included; and per pair the
    number of tokens that its sides share, and of the rest of either side."""
    shared, sides = [], []
    with gzip.open(data / "helpful-base.test.jsonl.gz", "rt", encoding="utf-8") as rows, path.open("w") as file:
        for row in map(json.loads, rows):
            a, b = ([*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id] for side in ("chosen", "rejected"))
            if len(a) > max_length or len(b) > max_length or a == b:
                continue
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            shared.append(same)
            sides.append((len(a) - same, len(b) - same))
            file.write(json.dumps({"chosen": row["chosen"], "rejected": row["rejected"]}) + "\n")
            if len(shared) == count:
                return str(path), shared, sides
    raise ValueError(f"{data}: only {len(shared)} pairs of at most {max_length} tokens")
