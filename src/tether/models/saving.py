"""Models and tokenizers into directories that ``from_pretrained`` reads, complete or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import ConfigError
from tether.models.adapters import CONFIG as ADAPTER_CONFIG
from tether.models.adapters import is_adapted, save_adapter


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path | str, *, overwrite: bool = False
) -> None:
    """Write weights (safetensors), configuration and tokenizer, as ``from_pretrained`` reads them; of a model with an
    adapter, the adapter and the tokenizer, as peft reads them.

    With ``overwrite``, they replace a model that is there, which stays until they are complete. Raises
    :class:`ConfigError` where the ``directory`` holds anything that they would be mixed with or replace.
    """
    path = Path(directory)
    require_vacant(path, overwrite=overwrite)
    if not occupied(path):
        save_weights(model, path)
        save_tokenizer(tokenizer, path)
        return
    with replacing(path) as candidate:
        save_model(model, tokenizer, candidate)


def save_weights(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the model without its tokenizer, with its own weights or with these: its state dict, or of a model with an
    adapter :func:`tether.models.trainable.trainable`."""
    if is_adapted(model):
        save_adapter(model, directory, weights)
    else:
        model.save_pretrained(directory, state_dict=None if weights is None else dict(weights))


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A path to write a model into, which then takes the place of what ``directory`` holds. That stays as it is until
    the block is done, and where anything raises. What a process that was killed left is removed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.saving-"
    for left in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=prefix) as temporary:
        candidate, before = Path(temporary) / "model", Path(temporary) / "before"
        yield candidate
        if directory.exists():
            directory.rename(before)
        try:
            candidate.rename(directory)
        except OSError:
            if before.exists():
                before.rename(directory)
            raise


def occupied(directory: Path) -> bool:
    """Whether there is a file of this name, or a directory that is not empty."""
    return directory.exists() and not (directory.is_dir() and next(directory.iterdir(), None) is None)


def require_vacant(directory: Path, *, overwrite: bool) -> None:
    """Raise :class:`ConfigError` where a model would be written over what is there: a model only with ``overwrite``,
    anything else never."""
    if not occupied(directory):
        return
    if not any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ConfigError("is there already, and is no model", where=directory, hint="name a directory that is not")
    if not overwrite:
        raise ConfigError("holds a model already", where=directory, hint="name another directory, or set overwrite")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the files of a tokenizer. Raises :class:`OSError` where they cannot be written."""
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the tokenizers package raises a plain Exception for a full disk
        raise OSError(str(error)) from error
