"""Reward models: a language model with a bias-free linear head ``score`` to one number, read at the last real token.

On disk a reward model is an ordinary ``AutoModelForSequenceClassification`` with ``num_labels=1``, or one of
:mod:`tether.models.classifiers` in the same layout; its ``config.json`` also holds ``score_mean`` and ``score_std``,
the statistics that :func:`normalised_scores` removes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tether.data.batching import micro_batches
from tether.errors import ModelError
from tether.models.adapters import is_adapted, load_adapter
from tether.models.checks import check_classifier
from tether.models.classifiers import classifier_class
from tether.models.linear import has_rounded_matmuls, round_matmuls
from tether.models.loading import (
    OUTPUT_HEADS,
    check_tokenizer,
    embedding_rows,
    is_reward_model,
    load_pretrained,
    load_tokenizer,
    model_config,
    output_head_names,
    place,
    resolve,
    split_adapter,
)
from tether.models.memory import within_memory
from tether.models.policy import final_states
from tether.models.quantised import Quantise, is_quantised, kind_of
from tether.models.saving import replacing, require_vacant, save_model
from tether.ops.reduce import length_mask
from tether.seeds import generator
from tether.stop_requests import stoppable
from tether.types import Batch, PromptCompletion

TOKEN_BUDGET = 16384
"""Default tokens per forward pass when scoring."""
RELOAD_TOLERANCE = {True: (1e-4, 1e-5), False: (0.05, 0.02)}
"""How far a score may change in a save and reload, in full precision (True) or not: a share of the scores' standard
deviation, and what rounding does to a score of size 1 when rows are batched differently."""


def new_reward_model(
    base: str,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantise: Quantise = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model on the trunk of the causal language model ``base``, with a head drawn from N(0, 1 / (D + 1)); or
    ``base`` itself, head included, where it already is a reward model.

    The tokenizer gets its own padding token where it has none or pads with EOS: transformers pools the right-most token
    that is not padding, and would otherwise read the score before the EOS.
    """
    if is_reward_model(base):
        return load_reward_model(base, dtype=dtype, device=device, quantise=quantise)
    if split_adapter(base)[1] is not None:
        raise ModelError(
            "an adapter of a language model; a reward model is trained on a whole one",
            where=base,
            hint="merge it with 'tether merge'",
        )
    tokenizer = load_tokenizer(base)
    model = classifier_on(base, dtype=dtype, quantise=quantise, device=device)
    check_tokenizer(base, tokenizer, model)
    head = head_of(model)
    scale = 1.0 / math.sqrt(head.weight.size(1) + 1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator(seed, "score head")) * scale)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        make_room(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    check_classifier(base, model, head)
    return place(model, device), tokenizer


def classifier_on(base: str, *, dtype: torch.dtype, **where: Any) -> PreTrainedModel:
    """A sequence classifier with one label on the trunk of the causal language model ``base``; its head is not set."""
    return load_pretrained(
        classifier_class(model_config(base)),
        base,
        dtype=dtype,
        allow_missing="score.",
        allow_unused=output_head_names(base),
        num_labels=1,
        **where,
    )


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the padding token that was added to ``tokenizer`` a row in the embedding, where it has none."""
    if len(tokenizer) > embedding_rows(model):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def load_reward_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantise: Quantise = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model of tether, TRL or OpenRLHF: a sequence classifier with one label and a head named ``score``."""
    config = model_config(name)
    if not is_reward_model(name):
        found = (config.architectures or ["not stated"])[0]
        raise ModelError(
            f"not a reward model: its architecture is {found}", where=name, hint="train one with 'tether reward'"
        )
    base, adapter = split_adapter(name)
    stated = config.num_labels if adapter is None and states_labels(name) else None
    if stated not in (None, 1):
        raise ModelError(f"a reward model has one label and this classifier has {stated}", where=name)
    mean, std = statistics(config)
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ModelError(
            f"scores cannot be normalised by the mean {mean} and std {std} of its configuration", where=name
        )
    tokenizer = load_tokenizer(name)
    if adapter is None or is_reward_model(base):
        model = load_pretrained(
            classifier_class(model_config(base)),
            base,
            dtype=dtype,
            allow_unused=OUTPUT_HEADS,
            num_labels=1,
            quantise=quantise,
            device=device,
        )
    else:
        model = classifier_on(base, dtype=dtype, quantise=quantise, device=device)
    if adapter is not None:
        make_room(model, tokenizer)
        load_adapter(model, adapter)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.score_mean, model.config.score_std = mean, std
        if not head_of(model).weight.requires_grad and not is_reward_model(base):
            raise ModelError("the adapter lacks the head of a reward model (modules_to_save: score)", where=name)
    check_tokenizer(name, tokenizer, model)
    check_classifier(name, model, head_of(model))
    return place(model, device), tokenizer


def states_labels(name: str) -> bool:
    """Whether the configuration file says how many labels there are; OpenRLHF's does not, and the library assumes 2."""
    written, _ = PretrainedConfig.get_config_dict(resolve(name))
    return bool({"num_labels", "id2label"} & written.keys())


def statistics(config: PretrainedConfig) -> tuple[float, float]:
    """Mean and standard deviation of raw scores: ``score_mean`` and ``score_std``, or OpenRLHF's ``mean`` and ``std``;
    0 and 1 where the configuration has none."""
    mean = getattr(config, "score_mean", getattr(config, "mean", 0.0))
    std = getattr(config, "score_std", getattr(config, "std", 1.0))
    return float(mean), float(std)


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from the last hidden state to the score."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ModelError(
            "no bias-free linear head named 'score', so not a reward model here", where=type(model).__name__
        )
    return head


def score_batch(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Raw scores [B], read at the last token of each row. Rows with the same prompt share its computation."""
    scores: Tensor = head_of(model)(final_states(model.base_model, batch))
    return scores.squeeze(-1).float()


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, rows: Sequence[PromptCompletion], *, token_budget: int = TOKEN_BUDGET
) -> Tensor:
    """Raw scores [N] of (prompt ids, completion ids), in their order."""
    batch = Batch.collate(rows, model.device)
    scores = torch.zeros(len(rows))
    for part in stoppable(micro_batches(batch, token_budget)):
        scores[part] = score_batch(model, batch.rows(part)).cpu()
    return scores


def normalised_scores(model: PreTrainedModel, raw: Tensor) -> Tensor:
    """(raw - mean) / std with the :func:`statistics` in the model's configuration."""
    mean, std = statistics(model.config)
    return (raw - mean) / std


def save_statistics(model: PreTrainedModel, directory: Path) -> None:
    """Write the configuration of a model whose adapter is in ``directory``: the mean and std of its scores, its padding
    token and number of labels."""
    config = copy.deepcopy(model.config)
    if is_quantised(model):
        del config.quantization_config  # a choice of whoever loads it
    config.save_pretrained(directory)


def save_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    probes: Sequence[PromptCompletion],
    *,
    overwrite: bool = False,
) -> None:
    """Save a reward model, reload it with the class that others load it with, and compare scores of the ``probes``.

    Heads are easily lost, renamed or newly initialised on the way. Raises :class:`ModelError`, and leaves nothing
    behind, where the reloaded weights or transformers' own pooling give other scores. Raises :class:`ConfigError` where
    the ``directory`` holds anything already: a model there is replaced only with ``overwrite``.
    """
    require_vacant(directory, overwrite=overwrite)
    expected, _ = within_memory(lambda budget: score_sequences(model, probes, token_budget=budget), TOKEN_BUDGET)
    if not torch.isfinite(expected).all():
        raise ModelError("not saved: the model's scores are not finite", where=directory)
    with replacing(directory) as candidate:
        save_model(model, tokenizer, candidate)
        if is_adapted(model):
            save_statistics(model, candidate)
            reloaded, _ = load_reward_model(
                str(candidate), dtype=model.dtype, device=model.device, quantise=kind_of(model)
            )
        else:
            reloaded = load_pretrained(classifier_class(model.config), str(candidate), dtype=model.dtype)
            reloaded = place(reloaded, model.device)
        if has_rounded_matmuls(model):  # the file is tested here, not the rounding
            round_matmuls(reloaded)
        batch = Batch.collate(probes, model.device)
        mask = length_mask(batch.lengths, batch.ids.size(1)).to(model.device)
        ids = batch.ids.masked_fill(~mask, tokenizer.pad_token_id)

        @torch.no_grad()
        def own_scores(rows: int) -> Tensor:
            parts = zip(ids.split(rows), mask.long().split(rows), strict=True)
            return torch.cat(
                [reloaded(input_ids=i, attention_mask=m).logits.squeeze(-1).float().cpu() for i, m in parts]
            )

        found, _ = within_memory(own_scores, len(probes))
        difference = float((found - expected).abs().max())
        full_precision = model.dtype == torch.float32 and not has_rounded_matmuls(model)
        share, rounding = RELOAD_TOLERANCE[full_precision]
        allowed = share * float(expected.std(unbiased=False)) + rounding * (1.0 + float(expected.abs().max()))
        if not difference <= allowed:
            raise ModelError(
                f"not saved: after a reload the scores differ by up to {difference:.2g}",
                where=directory,
                hint=f"{type(model).__name__} does not survive the Hugging Face layout",
            )
