"""Causal language models and tokenizers from a directory, a hub id or the embedded ``base``, checked before use."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tether.errors import ModelError
from tether.hub import settle_for_the_cache_when_offline
from tether.models.policy import completion_states, padded_states, policy_logits
from tether.types import Batch

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASE = "base"
"""The name of the embedded model."""


def resolve(name: str) -> str:
    """The directory or hub id behind a ``--model`` value; a directory must hold config.json and safetensors weights."""
    if name == BASE:
        return str(resources.files("tether") / "assets" / "base")
    path = Path(name)
    if not path.exists():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            settle_for_the_cache_when_offline()
            return name
        raise ModelError("no such model", where=name, hint=f"give a directory, a hub id (owner/name) or '{BASE}'")
    if not path.is_dir():
        raise ModelError("a model is a directory in the Hugging Face layout, and this is a file", where=name)
    if not (path / "config.json").is_file():
        raise ModelError("not a model directory: config.json is missing", where=name)
    if not any((path / f).is_file() for f in ("model.safetensors", "model.safetensors.index.json")):
        pickled = " (weights in a pickle are not loaded; convert them)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"no weights: model.safetensors is missing{pickled}", where=name)
    return name


def refuse_code(name: str, source: str) -> None:
    """Raise :class:`ModelError` where a model asks for code from the hub, or for weights that would be unpickled or are
    in another directory, or has an adapter, which transformers silently ignores where peft is not installed."""
    config = model_config(name)
    for attention in {part._attn_implementation for part in (config, config.get_text_config())} - {None}:
        if "/" in attention:
            raise ModelError(f"config.json asks for {attention}: code from the hub, which is not run", where=name)
    if cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False):
        raise ModelError(
            "has an adapter (adapter_config.json), which is not loaded", where=name, hint="merge it into its model"
        )
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None or (Path(index).parent / "model.safetensors").is_file():
        return
    for file in set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"model.safetensors.index.json names {file!r}, which is not a safetensors file beside it", where=name
            )


def load_pretrained(
    auto_class: Any, name: str, *, dtype: torch.dtype, allow_missing: str = "", **kwargs: Any
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` with safetensors only, no remote code and dropout off.

    Raises :class:`ModelError` where the file lacks weights, except those whose name begins with ``allow_missing``, or
    holds weights that are not finite.
    """
    source = resolve(name)
    try:
        refuse_code(name, source)
        model, info = auto_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **kwargs,
        )
    except ModelError:
        raise
    except Exception as error:  # config, network, safetensors and architecture errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the model cannot be loaded ({reason})", where=name) from error
    missing = sorted(key for key in info["missing_keys"] if not (allow_missing and key.startswith(allow_missing)))
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise ModelError(
            f"the weights do not fit the configuration ({len(wrong)} tensors, first {wrong[0]})", where=name
        )
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(
            f"{len(broken)} tensors hold weights that are not finite, the first is {broken[0]}", where=name
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # transformers before 5.23 uses sdpa, without the soft cap
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from the same directory or hub id."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # the same as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the tokenizer cannot be loaded ({reason})", where=name) from error
    # without its files, transformers returns a tokenizer of special tokens alone
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError("no tokenizer: tokenizer.json is missing, or its vocabulary is empty", where=name)
    return tokenizer


def place(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """``model``, moved to ``device``."""
    return cast(PreTrainedModel, cast(nn.Module, model).to(device))


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of rows of the model's input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise :class:`ModelError` unless every id of the tokenizer has a row in the model's embedding."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ModelError(
            f"the tokenizer does not belong to the model: it gives ids up to {highest} "
            f"and the model's embedding has {vocab_size} rows",
            where=name,
        )


def load_policy(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, dropout off.

    Raises :class:`ModelError` where one cannot be loaded or fails :func:`check_forward`.
    """
    if is_classifier(model_config(name)):  # with tied embeddings it would load, without its head
        raise ModelError("a reward model where a language model is needed", where=name)
    tokenizer = load_tokenizer(name)
    model = load_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    check_tokenizer(name, tokenizer, embedding_rows(model))
    check_forward(name, model)
    return place(model, device), tokenizer


@torch.no_grad()
def check_forward(name: str, model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless the model computes what tether assumes: its logits are the projection
    :func:`tether.models.policy.project` of its last hidden states, and these are the same in a packed group."""
    shared = [i % model.config.get_text_config().vocab_size for i in range(3)]
    batch = Batch.collate([(shared, shared), (shared, shared[:2])])
    try:
        known = policy_logits(model, batch.ids)
        packed, padded = completion_states(model.base_model, batch), padded_states(model.base_model, batch)
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} is not built as tether needs it, so its prompts cannot be shared ({error})",
            where=name,
        ) from error
    if not torch.allclose(known, model(input_ids=batch.ids, use_cache=False).logits, atol=1e-3, rtol=1e-2):
        raise ModelError(
            f"{type(model).__name__} does something to its logits that tether does not know, "
            "so its log-probs would be wrong",
            where=name,
        )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(packed.float(), padded.float(), atol=tolerance * float(padded.float().std()), rtol=tolerance):
        raise ModelError(
            f"{type(model).__name__} mixes tokens otherwise than by attention that tether knows, "
            "so a prompt cannot be shared by its completions",
            where=name,
        )


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence the model takes, in tokens."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    raise ModelError("the configuration states no context length", where=type(model).__name__)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and the generation configuration's (for a model that does not
    generate, such as a reward model, the configuration's)."""
    configured = getattr(getattr(model, "generation_config", None) or model.config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer, as ``from_pretrained`` reads them."""
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the files of a tokenizer. Raises :class:`OSError` where they cannot be written."""
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the tokenizers package raises a plain Exception for a full disk
        raise OSError(str(error)) from error


def is_classifier(config: Any) -> bool:
    """Whether a configuration is that of a sequence classifier, such as a reward model."""
    return any("SequenceClassification" in architecture for architecture in config.architectures or [])


def model_config(name: str) -> Any:
    """The configuration, without loading weights."""
    try:
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # the same as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the configuration cannot be read ({reason})", where=name) from error
