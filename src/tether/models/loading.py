"""Causal language models and tokenizers from a directory, a hub id or the embedded ``base``, checked before use."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from tether.errors import ModelError, TetherError, reason_of
from tether.hub import settle_for_the_cache_when_offline
from tether.models.adapters import CLASSIFIER, adapter_config, adapter_file, load_adapter
from tether.models.adapters import CONFIG as ADAPTER_CONFIG
from tether.models.checks import check_policy
from tether.models.checks import context_length as context_length
from tether.models.experts import route_in_float32
from tether.models.quantised import Quantise, check_blocks, is_quantised, quantisation, settle_products

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OLD_BUFFERS = re.compile(r"\.masked_bias$|\.rotary_emb\.inv_freq$")
"""Names of constants that older versions of transformers wrote into the file, and that are computed now."""
OUTPUT_HEADS = ("lm_head.", "embed_out.")
"""What the names on disk of an output head begin with."""
BASE = "base"
"""The name of the embedded model,"""
EMBEDDED = ("tether", "assets", "base")
"""and how its path ends."""
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def resolve(name: str, *, weights: bool = True) -> str:
    """The directory or hub id behind a ``--model`` value; a directory must hold config.json, and safetensors unless
    ``weights`` is False."""
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
    if (path / ADAPTER_CONFIG).is_file():
        return name
    if not (path / "config.json").is_file():
        raise ModelError("not a model directory: config.json is missing", where=name)
    if weights and not any((path / f).is_file() for f in ("model.safetensors", "model.safetensors.index.json")):
        pickled = " (weights in a pickle are not loaded; convert them)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"no weights: model.safetensors is missing{pickled}", where=name)
    return name


def refuse_code(name: str, source: str) -> None:
    """Raise :class:`ModelError` where a model asks for code from the hub, or for weights that would be unpickled or are
    in another directory."""
    config = model_config(name)
    for attention in {part._attn_implementation for part in (config, config.get_text_config())} - {None}:
        if "/" in attention:
            raise ModelError(f"config.json asks for {attention}: code from the hub, which is not run", where=name)
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None or (Path(index).parent / "model.safetensors").is_file():
        return
    for file in set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"model.safetensors.index.json names {file!r}, which is not a safetensors file beside it", where=name
            )


def load_pretrained(
    auto_class: Any,
    name: str,
    *,
    dtype: torch.dtype,
    allow_missing: str = "",
    allow_unused: Sequence[str] = (),
    quantise: Quantise = "none",
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PreTrainedModel:
    """``auto_class.from_pretrained`` with safetensors only, no remote code and dropout off, on the CPU;
    weights that are quantised on ``device``.

    Raises :class:`ModelError` where the file lacks weights, except those whose name begins with ``allow_missing``;
    where it holds weights that the model has no place for, except those that ``allow_unused`` says are not needed and
    those that the library ignores by its own list; and where it holds weights that are not finite.
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
            **quantisation(quantise, dtype=dtype, device=device),
            **kwargs,
        )
    except TetherError:
        raise
    except Exception as error:  # config, network, safetensors and architecture errors share no base class
        raise ModelError(f"the model cannot be loaded ({reason_of(error)})", where=name) from error
    check_weights(name, model, info, allow_missing=allow_missing, allow_unused=allow_unused)
    try:
        check_blocks(model)
    except ModelError as error:
        error.at(name)
        raise
    settle_products(model)
    route_in_float32(model)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # transformers before 5.23 uses sdpa, without the soft cap
    return model.eval()


def check_weights(
    name: str, model: PreTrainedModel, info: Mapping[str, Any], *, allow_missing: str, allow_unused: Sequence[str]
) -> None:
    """Raise :class:`ModelError` where the file and the model do not have the same weights, all of them finite."""
    missing = sorted(key for key in info["missing_keys"] if not (allow_missing and key.startswith(allow_missing)))
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise ModelError(
            f"the weights do not fit the configuration ({len(wrong)} tensors, first {wrong[0]})", where=name
        )
    unused = sorted(
        key
        for key in info["unexpected_keys"]
        if not key.startswith(tuple(allow_unused)) and not OLD_BUFFERS.search(key) and not is_buffer(model, key)
    )
    if unused:
        named = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        raise ModelError(
            f"{type(model).__name__} has no place for {len(unused)} of the weights in the file: {named}",
            where=name,
            hint="correct config.json, or remove them from the file if they are not needed",
        )
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(
            f"{len(broken)} tensors hold weights that are not finite, the first is {broken[0]}", where=name
        )


def is_buffer(model: PreTrainedModel, key: str) -> bool:
    """Whether a name in a file, with or without the prefix of the trunk, is that of a constant that the model makes."""
    names = {name for name, _ in cast(nn.Module, model).named_buffers()}
    return key in names or f"{model.base_model_prefix}.{key}" in names


def output_head_names(name: str) -> list[str]:
    """The names on disk of the weights of a causal language model that are not its trunk's: what a classifier on the
    same trunk does not need."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(name), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # an architecture may fail in any way
        raise ModelError(f"not a language model ({reason_of(error)})", where=name) from error
    own = [key for key in model.state_dict() if not key.startswith(f"{model.base_model_prefix}.")]
    return [*own, *OUTPUT_HEADS]


def split_adapter(name: str) -> tuple[str, str | None]:
    """The base of a ``--model`` value, and the directory or hub id of its adapter; for a whole model ``(name, None)``.

    Raises :class:`ModelError` where the adapter is not LoRA's or its base is an adapter itself.
    """
    source = resolve(name)
    found = adapter_config(source)
    if found is None:
        return name, None
    base = found["base_model_name_or_path"]
    if Path(base).parts[-3:] == EMBEDDED and not Path(base).is_dir():  # of another installation
        base = BASE
    with naming_the_adapter(name, base):
        if adapter_config(resolve(base)) is not None:
            raise ModelError("an adapter itself", where=base, hint="merge it with 'tether merge'")
    return base, source


@contextlib.contextmanager
def naming_the_adapter(name: str, base: str) -> Iterator[None]:
    """Errors about the base of an adapter say whose base it is."""
    try:
        yield
    except ModelError as error:
        error.at(f"{name}, an adapter of {base}")
        raise


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from the same directory or hub id; of an adapter without one, its base's."""
    source = resolve(name, weights=False)
    if adapter_config(source) and not any(adapter_file(source, file) for file in TOKENIZER_FILES):
        source, _ = split_adapter(name)
        source = resolve(source, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # the same as above
        raise ModelError(f"the tokenizer cannot be loaded ({reason_of(error)})", where=name) from error
    # without its files, transformers returns a tokenizer of special tokens alone
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError("no tokenizer: tokenizer.json is missing, or its vocabulary is empty", where=name)
    return tokenizer


def place(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """``model``, moved to ``device``, where quantised weights are already."""
    return model if is_quantised(model) else cast(PreTrainedModel, cast(nn.Module, model).to(device))


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of rows of the model's input embedding."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # the library's answer for an architecture whose embedding it does not know
        found = None
    rows = getattr(found, "num_embeddings", None)
    if not isinstance(rows, int):
        raise ModelError("has no embedding of tokens that tether knows", where=type(model).__name__)
    return rows


def unembedded(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """The tokens, by id, that an embedding with ``rows`` rows does not hold."""
    return {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless every id of the tokenizer has a row in the model's embedding.

    Special tokens that were added and have none, as Gemma 3's image token in its text models, are let pass: no text
    comes to them but their own names. Data that holds one raises ModelError when the model reads it.
    """
    rows = embedding_rows(model)
    lacking = unembedded(tokenizer, rows)
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if lacking.keys() - added or lacking.keys() & needed:
        raise ModelError(
            f"the tokenizer does not belong to the model: it gives ids up to {max(lacking)} "
            f"and the model's embedding has {rows} rows",
            where=name,
        )

    def check(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before each look-up, except within a CUDA graph, which reads what the model itself has drawn."""
        ids = inputs[0]
        if not ids.numel() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        highest = int(ids.max())
        if highest >= rows:
            raise ModelError(
                f"the data holds {lacking.get(highest, highest)!r}, for which the model has no embedding",
                where=name,
                hint="leave it out of the data",
            )

    if lacking:
        model.get_input_embeddings().register_forward_pre_hook(check)


def load_policy(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantise: Quantise = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, dropout off; of an adapter, its base with the adapter in place.

    Raises :class:`ModelError` where one cannot be loaded or fails :func:`tether.models.checks.check_policy`.
    """
    if is_reward_model(name):  # with tied embeddings it would load, without its head
        raise ModelError("a reward model where a language model is needed", where=name)
    base, adapter = split_adapter(name)
    tokenizer = load_tokenizer(name)
    model = load_pretrained(AutoModelForCausalLM, base, dtype=dtype, quantise=quantise, device=device)
    check_tokenizer(name, tokenizer, model)
    settle_generation(model, tokenizer)
    check_policy(base, model)
    if adapter is not None:
        load_adapter(model, adapter)
    return place(model, device), tokenizer


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and the generation configuration's (for a model that does not
    generate, such as a reward model, the configuration's). Ids that the model has no embedding for are never drawn and
    left out. Raises :class:`ModelError` for what names no token."""
    configured = getattr(getattr(model, "generation_config", None) or model.config, "eos_token_id", None)
    stated = configured if isinstance(configured, list | tuple) else [configured]
    ids = {token_id(model, tokenizer, value) for value in stated if value is not None} | {tokenizer.eos_token_id}
    rows = embedding_rows(model)
    return tuple(sorted(i for i in ids if i is not None and 0 <= i < rows))


def token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, value: object) -> int:
    """The id that a configuration states as a number, or as text: a token, or a number's digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    known = tokenizer.get_vocab()
    if isinstance(value, str) and (value in known or value.isdecimal()):
        return int(known.get(value, value))
    raise ModelError(
        f"eos_token_id is {value!r}, which is no id and no token",
        where=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        hint="correct generation_config.json or config.json",
    )


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the generation configuration one that every version of the library reads and saves.

    Ends given as text become ids. Settings of sampling without ``do_sample``, the commonest that the library calls
    invalid, mean that it samples. Of a configuration that is invalid otherwise, only the special tokens are kept:
    tether reads nothing else of it.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    ends = config.eos_token_id
    if isinstance(ends, list):
        config.eos_token_id = [token_id(model, tokenizer, end) for end in ends]
    elif ends is not None:
        config.eos_token_id = token_id(model, tokenizer, ends)
    if not valid(config):
        config.do_sample = True
    if not valid(config):
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: value for name in names if not isinstance(value := getattr(config, name), int) or value >= 0}
        model.generation_config = GenerationConfig(**ids)


def valid(config: GenerationConfig) -> bool:
    """Whether every version of the library saves a generation configuration."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def is_classifier(config: Any) -> bool:
    """Whether a configuration is that of a sequence classifier, such as a reward model (OpenRLHF: ``RewardModel``)."""
    names = config.architectures or []
    return any("SequenceClassification" in name or name == "RewardModel" for name in names)


def is_reward_model(name: str) -> bool:
    """Whether the model of this name is a sequence classifier, or an adapter of one."""
    adapter = adapter_config(resolve(name))
    return is_classifier(model_config(name)) if adapter is None else adapter.get("task_type") == CLASSIFIER


def model_config(name: str) -> Any:
    """The configuration, without loading weights; of an adapter that has none, its base's."""
    source = resolve(name)
    if adapter_config(source) and adapter_file(source, "config.json") is None:
        source = resolve(split_adapter(name)[0])
    return config_at(source, name=name)


def config_at(source: str, *, name: str = "") -> Any:
    """The configuration at a directory or hub id, of a model that is called ``name``."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # the same as above
        raise ModelError(f"the configuration cannot be read ({reason_of(error)})", where=name or source) from error
