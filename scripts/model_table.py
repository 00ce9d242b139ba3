"""Try every causal and classifier architecture of the installed transformers at toy size, and write what works.

    nice python -m scripts.model_table            # all of them, about ten minutes on one core
    python -m scripts.model_table llama gpt_oss   # only the rows of these

Each is built with random weights, saved, loaded as a policy and as a reward model as any command loads one, and where
that succeeds compared again with the library's own forward pass, on other rows and by other code than tether's checks.
A row that is loaded and differs, or that ends in anything else than one line, makes the script fail.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from tether.errors import TetherError
from tether.generation.engine import Engine
from tether.models.classifiers import in_the_library
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs
from tether.models.reward import load_reward_model, new_reward_model, score_sequences
from tether.models.unpacked import is_unpacked
from tether.types import Batch, Prompt, Sampling, make_requests

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m scripts.model_table -->\n", "<!-- end of the table -->\n"
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \| (.*) \|$", re.MULTILINE)
SECONDS = 60
VOCAB = 264
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("decoder_hidden_size", "emb_dim", "dim_model", "attention_hidden_size", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dim_ff", "dff", "d_inner", "feed_forward_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "global_head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "swa_window_size"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk", "mamba_chunk_size", "chunk_size", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "q_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers", "bos_token_id", "num_mem_blocks"), 0),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "eos_token_id"), 1),
    **dict.fromkeys(("pad_token_id", "mamba_expand", "expand", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_head", "mamba_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "rotary_dim", "rope_dim"), 4),
    **dict.fromkeys(("index_n_heads", "num_global_layers"), 2),
    "index_head_dim": 8,
    "num_routed_experts": 4,
    "is_decoder": True,
    "logits_scaling": 3.0,
}  # fmt: skip
"""Sizes by the names that configurations give them."""
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", **ROPE, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
FACTORS = ("short_factor", "long_factor")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama, dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, YaRN": ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "llama, llama3 RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama, LongRoPE": ("llama", {"rope_parameters": LONG | {"original_max_position_embeddings": 64}}),
    "phi3, LongRoPE": (
        "phi3",
        {
            "rope_parameters": LONG | {"original_max_position_embeddings": 64},
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3, LongRoPE, part of each head (Phi 4 mini)": (
        "phi3",
        {
            "rope_parameters": LONG
            | {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
            | {name: LONG[name][:3] for name in FACTORS},
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3, LongRoPE, one factor": (
        "phi3",
        {
            "rope_parameters": LONG | {"short_factor": LONG["long_factor"]},
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
    "falcon, multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "alibi": False}),
    "falcon, multi-head, ALiBi": (
        "falcon",
        {
            "multi_query": False,
            "new_decoder_architecture": False,
            "alibi": True,
            "parallel_attn": False,
            "num_kv_heads": 4,
        },
    ),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, projected (350m)": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "olmo, clipped": ("olmo", {"clip_qkv": 1.0}),
    "mixtral, window": ("mixtral", {"sliding_window": 8}),
}
"""Rows of one architecture with other settings: its model type, and what is different."""
LEFT_OUT = ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"))
"""Names whose default is better for some architectures: tried in this order."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<s>", "</s>", "<pad>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def toy_values(config_class: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """Arguments for a toy configuration, those of its parts included."""
    default = config_class()
    known = {*default.to_dict(), *getattr(config_class, "attribute_map", {})}
    renamed = getattr(config_class, "attribute_map", {})
    values = {renamed.get(k, k): v for k, v in TINY.items() if k in known and k not in left_out}
    for part, part_class in getattr(config_class, "sub_configs", {}).items():
        with contextlib.suppress(Exception):  # the part of an architecture that is tried with its own sizes
            values[part] = toy_values(part_class, left_out)
    return values


def build(kind: str, auto_class: Any, directory: Path) -> None:
    """Save a toy model of this kind with random weights; raises the last error where none can be built."""
    failure: Exception | None = None
    for left_out in LEFT_OUT:
        torch.manual_seed(0)
        try:
            base, settings = VARIANTS.get(kind, (kind, {}))
            config = CONFIG_MAPPING[base](**(toy_values(CONFIG_MAPPING[base], left_out) | settings))
            if auto_class is AutoModelForSequenceClassification:
                config.num_labels = 1
            model = auto_class.from_config(config).eval()
            if model.num_parameters() > 2e8:
                raise ValueError(f"{model.num_parameters():,} parameters are no toy")
            with torch.no_grad():
                for weight in model.parameters():
                    if (
                        weight.is_floating_point()
                        and (weight == weight.flatten()[0]).all()
                        and weight.flatten()[0] == 0
                    ):
                        weight.normal_(std=0.3)  # biases and sinks that begin at zero would hide what they do
                model(input_ids=torch.tensor([[5, 9, 17, 4, 33]]))
            model.save_pretrained(directory)
            tokenizer().save_pretrained(directory)
            return
        except Exception as error:  # whatever an architecture raises at sizes it does not like
            failure = error
    assert failure is not None
    raise failure


def rows(seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts, some of them shared, and completions, of mixed lengths."""
    draw = random.Random(seed)
    found = []
    for length, members in ((11, 3), (1, 2), (30, 1), (5, 1)):
        prompt = tuple(draw.randrange(3, 250) for _ in range(length))
        for _ in range(members):
            found.append((prompt, tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 25)))))
    return found


@torch.no_grad()
def try_policy(directory: str) -> tuple[float, bool]:
    """The largest difference from the library's own log-probs, of the training pass and of the engine, in nats; and
    whether the rows of both are padded."""
    model, words = load_policy(directory)
    engine = Engine(model, words)
    batch = Batch.collate(rows(1))
    (found,) = completion_logprobs(model, batch, temperature=1.0)
    prompts = [Prompt(ids=prompt, text="") for prompt in dict(rows(2))]
    drawn = engine.generate(make_requests(prompts, group_size=2, seed=1), sampling=Sampling(max_new_tokens=12))
    texts = [(p, c, found[i, : len(c)]) for i, (p, c) in enumerate(rows(1))]
    texts += [(g.prompt.ids, c.ids, torch.tensor(c.sampler_logp)) for g in drawn for c in g.completions]
    worst = 0.0
    for prompt, completion, logp in texts:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        known = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        worst = max(worst, float((known - logp).abs().max()))
    return worst, is_unpacked(model)


@torch.no_grad()
def try_reward_model(directory: str, load: Callable[[str], Any]) -> tuple[float, bool]:
    """The largest difference from the library's own scores, in standard deviations of them; and whether rows are
    padded."""
    model, _ = load(directory)
    found = score_sequences(model, rows(1))
    known = torch.cat([model(input_ids=torch.tensor([[*p, *c]])).logits.flatten() for p, c in rows(1)])
    return float((found - known).abs().max() / known.std()), is_unpacked(model)


def verdict(kind: str, auto_class: Any, attempt: Callable[[str], tuple[float, bool]]) -> str:
    """``works`` or ``works, padded``, ``refused: ...``, ``not tried: ...``; or ``WRONG ...``, which must not happen."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            build(kind, auto_class, Path(directory))
        except Exception as error:
            return f"not tried: {first_line(error)}"
        try:
            difference, padded = attempt(directory)
        except TetherError as error:
            text = str(error).removeprefix(f"{directory}: ")
            return f"WRONG: several lines: {text!r}" if "\n" in text else f"refused: {text}"
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {first_line(error)}"
    if not difference < 0.02:
        return f"WRONG: differs by {difference:.2g}"
    return "works, padded" if padded else "works"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def try_kind(kind: str, answer: Connection) -> None:
    """Send the verdicts on one architecture: as a policy, then as a reward model."""
    warnings.simplefilter("ignore")
    base, _ = VARIANTS.get(kind, (kind, {}))
    causal, classifier = (
        base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        base in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    answer.send(verdict(kind, AutoModelForCausalLM, try_policy) if causal else "-")
    made = lambda directory: try_reward_model(directory, lambda name: new_reward_model(name, seed=0))  # noqa: E731
    loaded = lambda directory: try_reward_model(directory, load_reward_model)  # noqa: E731
    if classifier:
        tried = (AutoModelForCausalLM, made) if causal else (AutoModelForSequenceClassification, loaded)
        answer.send(verdict(kind, *tried))
    elif gets_own_class(base):
        answer.send(verdict(kind, AutoModelForCausalLM, made).replace("works", "works, own class"))
    else:
        answer.send("-")


def gets_own_class(kind: str) -> bool:
    """Whether tether makes the class of this architecture's reward models."""
    try:
        return not in_the_library(CONFIG_MAPPING[kind]())
    except Exception:  # a configuration without defaults, of which no toy is built either
        return False


def isolated(kind: str) -> list[str]:
    """The two verdicts, from a process of its own: an architecture may crash or never end."""
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=try_kind, args=(kind, writer), daemon=True)
    process.start()
    writer.close()
    found: list[str] = []
    with contextlib.suppress(EOFError):
        while len(found) < 2 and reader.poll(SECONDS):
            found.append(reader.recv())
    alive = process.is_alive() and len(found) < 2
    if alive:
        process.kill()
    process.join()
    lost = f"not tried: more than {SECONDS} s" if alive else f"WRONG: the process ended with {process.exitcode}"
    return [*found, *[lost] * (2 - len(found))]


def table(kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    for kind in kinds:
        policy, reward = isolated(kind)
        print(f"{kind:28} {policy[:90]:92} {reward[:90]}", flush=True)
        yield kind, policy, reward


def markdown(found: dict[str, tuple[str, str]]) -> str:
    """The table, and how many there are of each."""
    counts = [
        f"{sum(row[i].startswith('works') for row in found.values())} of "
        f"{sum(row[i] != '-' for row in found.values())} {what}"
        for i, what in enumerate(("as policies", "as reward models"))
    ]
    lines = [
        f"With transformers {transformers.__version__}: {' and '.join(counts)} work.",
        "",
        "| `model_type` | policy | reward model |",
        "|---|---|---|",
        *(f"| `{kind}` | {policy} | {reward} |" for kind, (policy, reward) in sorted(found.items())),
    ]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """``text`` within a cell of the table."""
    return (text if len(text) < 170 else text[:167] + "...").replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all of them unless given")
    kinds = parser.parse_args().kinds
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    every = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, *VARIANTS})
    found = {kind: (cell(policy), cell(reward)) for kind, policy, reward in table(kinds or every)}
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    others = {kind: (policy, reward) for kind, policy, reward in ROW.findall(page) if kinds and kind in every}
    PAGE.write_text(f"{head}{BEGIN}\n{markdown(others | found)}\n{END}{tail}", encoding="utf-8")
    wrong = [kind for kind, row in found.items() if any("WRONG" in text for text in row)]
    print(f"{len(wrong)} wrong: {', '.join(wrong)}" if wrong else "none is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
