"""Checkpoints: an algorithm's ``State`` as safetensors and JSON, written aside and renamed when whole.

Weights of the model that is trained are in the Hugging Face layout under ``model/``; other modules, optimiser tensors,
float32 masters of bfloat16 weights and best-so-far weights are in ``tensors.safetensors``; everything else of the state
is in ``state.json``. The frozen reference is not saved: it is the model that the run's configuration names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.algorithms.optimise import masters
from tether.models.loading import save_model
from tether.runtime.files import whole


def save_checkpoint(run: Path, step: int, state: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write ``run/checkpoints/step_NNNNNN`` from a ``State`` dataclass; gives its path."""
    final = run / "checkpoints" / f"step_{step:06d}"
    final.parent.mkdir(exist_ok=True)
    with whole(final) as partial:
        partial.mkdir()
        write_state(partial, state, tokenizer)
    return final


def write_state(directory: Path, state: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The parts of a ``State`` in their files."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if field.name == "reference":
            continue
        if isinstance(value, nn.Module):
            tensors |= {f"{field.name}.master.{name}": tensor for name, tensor in masters(value).items()}
        if isinstance(value, PreTrainedModel):
            save_model(value, tokenizer, directory / "model")
        elif isinstance(value, nn.Module):
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in value.state_dict().items()}
        elif isinstance(value, torch.optim.Optimizer):
            optimiser_tensors, plain[field.name] = split_optimiser(value)
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in optimiser_tensors.items()}
        elif isinstance(value, dict):
            tensors |= {f"{field.name}.{name}": tensor for name, tensor in value.items()}
        else:
            plain[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    save_file(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, directory / "tensors.safetensors"
    )
    (directory / "state.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")


def split_optimiser(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by ``index.name``, and its parameter groups as plain data."""
    whole = optimiser.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, entries in whole["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
    return tensors, {"param_groups": whole["param_groups"]}
