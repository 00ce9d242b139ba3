"""Whether a model computes what tether assumes: compared with the library's own forward pass, row by row, when loaded.

Lengths at which an architecture changes what it does are named by its configuration: windows, chunks, the length from
which positions are turned otherwise (:func:`thresholds`). The comparison crosses each of them that the context allows
and that costs less than :data:`AFFORDABLE`; a change of the turning of positions is found at any length, because
positions cost nothing. The engine has a check of its own (:mod:`tether.generation.checks`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ModelError, TetherError, reason_of
from tether.models.linear import has_rounded_matmuls
from tether.models.memory import out_of_memory
from tether.models.packing import pack
from tether.models.policy import final_states, packed_states, project
from tether.models.unpacked import is_unpacked, set_unpacked
from tether.types import Batch, PromptCompletion

AFFORDABLE = 4e12
"""FLOPs that the comparison at one threshold may take; beyond, it is left out. About 512 tokens for a model of 1.3
billion parameters, half a minute on two cores."""
TOLERANCE = {True: 1e-3, False: 0.1}
"""The largest relative difference of two hidden states that is rounding, in full precision (True) or not."""
LONG_PADDING = (12, 50)
"""Lengths beside which short rows of a model that is unpacked are compared too: what mixes tokens in its own way may do
so from some distance on."""
NAMES = re.compile(r"window|chunk|original_max_position|block_size|topk|floor_scale|local", re.IGNORECASE)
"""Names of what a configuration says about lengths,"""
COUNTS = re.compile(r"layer|expert|theta|freq|head", re.IGNORECASE)
"""and those of them that count something else."""


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence the model takes, in tokens."""
    stated = stated_context(model)
    if stated is None:
        raise ModelError("the configuration states no context length", where=type(model).__name__)
    return stated


def stated_context(model: PreTrainedModel) -> int | None:
    """The context length in the model's configuration, if there is one; with LongRoPE, that of
    :func:`longrope_context`."""
    config = model.config.get_text_config()
    if original := longrope_context(config):
        return original
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def longrope_context(config: Any) -> int | None:
    """The original context length of a configuration with LongRoPE: the library turns all rows of a pass otherwise once
    one of them is longer. None where both are turned alike."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    if rope.get("short_factor") == rope.get("long_factor"):
        return None
    return cast(int | None, rope.get("original_max_position_embeddings")) or getattr(
        config, "original_max_position_embeddings", None
    )


def tried_context(model: PreTrainedModel) -> int:
    """Tokens that a comparison may use: the context, or few where the configuration states none."""
    return stated_context(model) or 64


def thresholds(model: PreTrainedModel) -> list[int]:
    """The lengths below the model's context at which it may change what it does, as its configuration names them."""

    def named(values: Mapping[str, Any]) -> Iterator[int]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from named({str(key): inner for key, inner in value.items()})
            elif NAMES.search(name) and not COUNTS.search(name):
                found = value if isinstance(value, list | tuple) else [value]
                yield from (int(number) for number in found if isinstance(number, int | float))

    lengths = set(named(model.config.get_text_config().to_dict()))
    return sorted(length for length in lengths if 1 < length < tried_context(model) - 1)


def affordable(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a forward pass of this many tokens costs less than :data:`AFFORDABLE`."""
    return 2.0 * model.num_parameters() * tokens <= AFFORDABLE


def probe_ids(model: PreTrainedModel, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Token ids without meaning to the architecture: spread over the vocabulary, none of them named by the
    configuration."""
    config = model.config.get_text_config()
    vocabulary = min(config.vocab_size, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings)
    stated = {**model.config.to_dict(), **config.to_dict()}
    special: set[Any] = set()
    for name, value in stated.items():
        if name.endswith(("token_id", "token_index", "token_ids")):
            special |= set(value) if isinstance(value, list) else {value}
    plain = [i for i in range(min(vocabulary, 4096)) if i not in special] or list(range(vocabulary))
    return tuple(plain[(7919 * (i + 1) + 101 * seed + i * i) % len(plain)] for i in range(count))


def relative_gap(found: Tensor, known: Tensor) -> float:
    """The largest |found - known| / |known| of states [N, D]; infinite where it is not a number."""
    found, known = found.float(), known.float()
    gap = ((found - known).norm(dim=-1) / known.norm(dim=-1).clamp(min=1e-12)).amax()
    return float(gap) if torch.isfinite(gap) else float("inf")


def tolerance_of(model: PreTrainedModel) -> float:
    """Of :data:`TOLERANCE`, the one for this model's arithmetic."""
    return TOLERANCE[model.dtype == torch.float32 and not has_rounded_matmuls(model)]


@contextlib.contextmanager
def refusing(name: str, model: PreTrainedModel) -> Iterator[None]:
    """Whatever the forward passes of an unknown architecture raise, as a :class:`ModelError` of one line."""
    try:
        yield
    except TetherError as error:
        error.at(name)
        raise
    except Exception as error:  # an architecture may fail in any way
        if out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} is not built as tether needs it ({reason_of(error)})", where=name
        ) from error


@torch.no_grad()
def check_policy(name: str, model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless the model computes what tether assumes of a policy: its logits are the
    projection :func:`tether.models.policy.project` of its last hidden states, and these are the same in a pack."""
    with refusing(name, model):
        row = _tensor(model, probe_ids(model, min(8, tried_context(model))))
        states, known = _own_states(model, row), model(input_ids=row, use_cache=False).logits[0]
        if relative_gap(project(model)(states), known) > tolerance_of(model):
            raise ModelError(
                f"{type(model).__name__} does something to its logits that tether does not know, "
                "so its log-probs would be wrong"
            )
        check_passes(model)


@torch.no_grad()
def check_classifier(name: str, model: PreTrainedModel, head: nn.Linear) -> None:
    """Raise :class:`ModelError` unless the model computes what tether assumes of a reward model: its score is ``head``
    of the last hidden state of its last token, and that is the same in a pack."""
    with refusing(name, model):
        row = _tensor(model, probe_ids(model, min(8, tried_context(model))))
        state, known = _own_states(model, row)[-1], model(input_ids=row, use_cache=False).logits.flatten()
        size = float(head.weight.float().norm() * state.float().norm())
        if known.numel() != 1 or not float((head(state) - known).abs()) <= tolerance_of(model) * size:
            raise ModelError(
                f"{type(model).__name__} reads its score otherwise than from the last token's last hidden state, "
                "so its scores would be wrong"
            )
        check_passes(model)


def check_passes(model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless every row has the same last hidden states in a pack as by itself or, failing
    that, padded beside others; the model is then computed so (:mod:`tether.models.unpacked`)."""
    try:
        check_packing(model)
    except Exception as error:  # whatever an unknown architecture raises
        if out_of_memory(error):
            raise
        set_unpacked(model, True)
        try:
            check_rows(model)
        except Exception:
            set_unpacked(model, False)
            raise error from None


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless every row has the same last hidden states in a pack as by itself."""
    for length in thresholds(model):
        check_positions(model, length)
    check_rows(model)


@torch.no_grad()
def check_rows(model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless every row has the same last hidden states beside others as by itself."""
    context = tried_context(model)
    lengths = (4, *(LONG_PADDING if is_unpacked(model) else ()), *thresholds(model))
    for length in (lengths[0], *(n for n in lengths[1:] if affordable(model, 3 * n))):
        rows = rows_across(model, min(length, context - 4))
        batch = Batch.collate(rows, model.device)
        found = final_states(model.base_model, batch)
        known = torch.stack([_own_states(model, _tensor(model, (*p, *c)))[-1] for p, c in rows])
        if relative_gap(found, known) > tolerance_of(model):
            raise ModelError(
                f"{type(model).__name__} mixes tokens otherwise than by attention that tether knows "
                f"(at {max(len(p) + len(c) for p, c in rows)} tokens), "
                "so a prompt cannot be shared by its completions"
            )


def rows_across(model: PreTrainedModel, length: int) -> list[PromptCompletion]:
    """Two completions of one prompt that end a little beyond ``length`` tokens, and a short row."""
    prompt = probe_ids(model, max(1, length - 2))
    return [
        (prompt, probe_ids(model, min(5, 2 + length), seed=1)),
        (prompt, probe_ids(model, min(3, 2 + length), seed=2)),
        (probe_ids(model, 1, seed=3), probe_ids(model, 1, seed=4)),
    ]


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Raise :class:`ModelError` where a row that reaches position ``length`` changes how others in its pack turn
    theirs, as LongRoPE and dynamic scaling do: there, one row's states depend on the longest of the pack."""
    rows = [(probe_ids(model, 3, seed=5), probe_ids(model, 2, seed=6)), (probe_ids(model, 1), probe_ids(model, 1))]
    packed = pack(Batch.collate(rows, model.device), ends=True)
    alone = packed_states(model.base_model, packed)
    positions = packed.positions.clone()
    positions[0, int(packed.ends[1])] = length + 1
    beside = packed_states(model.base_model, replace(packed, positions=positions))
    first = slice(int(packed.ends[0]) - 4, int(packed.ends[0]) + 1)
    if relative_gap(beside[first], alone[first]) > tolerance_of(model):
        raise ModelError(
            f"{type(model).__name__} turns all positions of a pass otherwise once one of them reaches {length}, "
            "so rows cannot share a pass",
            hint="a variant of the model without such scaling (LongRoPE, dynamic) works",
        )


def _own_states(model: PreTrainedModel, row: Tensor) -> Tensor:
    """The last hidden states [S, D] of a row [1, S] by itself, with the library's own attention."""
    states: Tensor = model.base_model(input_ids=row, use_cache=False).last_hidden_state
    return states[0]


def _tensor(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)
