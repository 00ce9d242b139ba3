"""``tether merge``: an adapter and its base as one whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from tether.errors import ConfigError, ModelError
from tether.flags import POSITIONAL
from tether.looking.terminal import show
from tether.models.adapters import merge_adapter
from tether.models.loading import is_reward_model, load_policy, model_config, split_adapter
from tether.models.reward import load_reward_model, save_reward_model
from tether.models.saving import require_vacant, save_model
from tether.training.inputs import naming_the_model_of_a_run

PROBES = (((0, 1, 2), (3, 4)), ((0, 3), (2, 1, 1)))
"""Rows, ids that any vocabulary has, for which a merged reward model gives the same scores after a reload."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write the model that an adapter and its base are, as a whole model that needs neither."""

    model: str = field(metadata={POSITIONAL: "DIR"})
    """Directory or hub id of the adapter, of a policy or of a reward model."""
    out: str
    """Directory to write the model to."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of its weights; auto is that of the base as it was saved. In bfloat16 the sum W + s B A is rounded."""
    overwrite: bool = False
    """Replace a model in the directory. By default, a directory that is not empty is refused."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)


@naming_the_model_of_a_run()
def main(command: Merge) -> None:
    base, adapter = split_adapter(command.model)
    if adapter is None:
        raise ModelError("not an adapter, so there is nothing to merge", where=command.model)
    out = Path(command.out)
    require_vacant(out, overwrite=command.overwrite)
    stated = model_config(base).dtype or torch.float32
    dtype = stated if command.dtype == "auto" else getattr(torch, command.dtype)
    if is_reward_model(command.model):
        model, tokenizer = load_reward_model(command.model, dtype=dtype)
        merge_adapter(model)
        save_reward_model(model, tokenizer, out, PROBES, overwrite=command.overwrite)
    else:
        model, tokenizer = load_policy(command.model, dtype=dtype)
        merge_adapter(model)
        save_model(model, tokenizer, out, overwrite=command.overwrite)
    show(str(out))
