"""Low-rank adapters (LoRA) through peft: put into a model in place, read and written in peft's layout, merged.

A linear layer with the frozen weight W computes x W^T + s (x A^T) B^T; A, [r, in], and B, [out, r], are trained. s is
alpha / r, with rsLoRA alpha / sqrt(r). B is zero at first, so that a new adapter changes nothing. Adapters are float32
whatever the precision of W, and are rounded to that of x where they are multiplied. The model stays an instance of its
class, so that nothing else of tether knows of them but what saves, loads and counts weights.

peft is imported where it is used: it is the extra ``lora``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from tether.errors import ConfigError, ModelError, reason_of
from tether.models.quantised import import_bitsandbytes
from tether.models.trainable import trainable
from tether.seeds import derive_seed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"
"""peft's name of the adapter within the model."""
PREFIX = "base_model.model."
"""What peft puts before the names of weights in a file."""
ALL_LINEAR = "all-linear"
CLASSIFIER, POLICY = "SEQ_CLS", "CAUSAL_LM"
"""peft's names of what a model with an adapter is for."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters (LoRA)."""

    lora_rank: int = 0
    """Train adapters of this rank and keep the weights of the model frozen; 0 trains all weights."""
    lora_alpha: float | None = None
    """Scale: what an adapter adds is multiplied by lora_alpha / lora_rank. Twice the rank unless given."""
    lora_dropout: float = 0.0
    """Dropout of the input of adapters in an update; not for PPO and GRPO, which compare log-probs of an update with
    those of the sampler."""
    lora_targets: str = ALL_LINEAR
    """Layers that get an adapter: all-linear is each linear layer but the output head; or names such as
    q_proj,v_proj."""
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by lora_alpha / sqrt(lora_rank); dora trains the norm of each row of the weights too, for more
    arithmetic."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        alone = [name for name in ("lora_alpha", "lora_dropout") if getattr(self, name)]
        ConfigError.unless(
            self,
            {
                "lora_rank must be 0 or more": self.lora_rank >= 0,
                "lora_alpha must be positive": self.lora_alpha is None or self.lora_alpha > 0,
                "lora_dropout must be 0 or more and less than 1": 0 <= self.lora_dropout < 1,
                "lora_targets must name layers": bool(self.target_names),
                f"{' and '.join(alone) or 'lora_alpha'} needs a lora_rank": self.lora_rank > 0 or not alone,
            },
        )

    @property
    def target_names(self) -> list[str]:
        return [name for part in self.lora_targets.split(",") if (name := part.strip())]


def prepare_peft(where: str) -> None:
    """Raise :class:`ConfigError` where peft is not installed; import bitsandbytes, which peft would import with what it
    fetches (:func:`tether.models.quantised.import_bitsandbytes`)."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapters need the package peft", where=where, hint="pip install 'tether-rlhf[lora]'")
    if importlib.util.find_spec("bitsandbytes") is not None:
        import_bitsandbytes()


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return NAME in getattr(model, "peft_config", {})


def add_adapter(model: PreTrainedModel, options: Lora, *, seed: int) -> None:
    """Put a new adapter, which changes nothing yet, into ``model``, and freeze all else but the head of a reward model.

    A is drawn from ``seed``. Raises :class:`ConfigError` where the targets name no layer, and :class:`ModelError` where
    peft cannot adapt one.
    """
    prepare_peft("--lora-rank")
    from peft import LoraConfig

    names = options.target_names
    classifier = hasattr(model, "score")
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=cast(int, options.lora_alpha or 2 * options.lora_rank),
        lora_dropout=options.lora_dropout,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        use_rslora=options.lora_variant == "rslora",
        use_dora=options.lora_variant == "dora",
        modules_to_save=["score"] if classifier else None,
        task_type=CLASSIFIER if classifier else POLICY,
        base_model_name_or_path=portable_name(model),
    )
    if names != [ALL_LINEAR] and (unknown := [name for name in names if not names_a_layer(model, name)]):
        raise ConfigError(
            f"the model has no layer named {unknown[0]!r}",
            where="--lora-targets",
            hint=f"it has {', '.join(linear_names(model))}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapter"))
        inject(model, config)


def portable_name(model: PreTrainedModel) -> str:
    """What an adapter calls its base: a hub id as it is, a directory by its whole path."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def names_a_layer(model: nn.Module, name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules())


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of the layers with a weight matrix, each once, in their order."""
    found = [path for path, part in model.named_modules() if getattr(getattr(part, "weight", None), "ndim", 0) == 2]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in found))


def inject(model: PreTrainedModel, config: Any) -> None:
    """Put the layers of an adapter into ``model``, in float32; the modules to save are trained where they are."""
    from peft import inject_adapter_in_model

    whole, config.modules_to_save = config.modules_to_save or [], None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on layers that need transposing, which peft does
            inject_adapter_in_model(config, model, NAME)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"peft cannot adapt {type(model).__name__} ({reason_of(error)})") from error
    config.modules_to_save = list(whole) or None
    for name, weight in model.named_parameters():
        if of_adapter(name):
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        else:
            weight.requires_grad_(any(path_names(name, module) for module in whole))
    for layer in model.modules():
        if type(layer) is peft_linear() and is_plain(layer):
            layer.__class__ = lean_linear()
    tied = {id(weight) for weight in tied_weights(model)}
    for name, weight in trainable(model).items():
        if id(weight) in tied:
            raise ModelError(f"modules_to_save: {name} is tied to another weight, which would change with it")
    model.eval()


def peft_linear() -> type[nn.Module]:
    """peft's layer around a linear one."""
    from peft.tuners.lora.layer import Linear

    return cast(type[nn.Module], Linear)


def is_plain(layer: Any) -> bool:
    """Whether the layer is plain LoRA: no variant of it, and no bias."""
    return not layer.lora_variant and not layer.lora_bias[NAME]


@functools.cache
def lean_linear() -> type[nn.Module]:
    """peft's layer with another forward pass, of fewer operations and tensors: ``out + s low B^T`` is one product, and
    what is kept for the backward pass is ``x`` as it is. A decoding step of a small model is a quarter faster."""
    parent: Any = peft_linear()

    class LeanLinear(parent):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                return cast(Tensor, super().forward(x, *args, **kwargs))
            out: Tensor = self.base_layer(x, *args, **kwargs)
            low = self.lora_dropout[NAME](x).flatten(0, -2) @ self.lora_A[NAME].weight.to(x.dtype).T
            rows, b = out.flatten(0, -2), self.lora_B[NAME].weight.to(x.dtype).T
            add = rows.addmm if torch.is_grad_enabled() else rows.addmm_
            return add(low, b, alpha=self.scaling[NAME]).view(out.shape)

    return LeanLinear


def tied_weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights that the input and the output of the model share."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    return [cast(Tensor, embedding.weight)] if shared else []


def path_names(parameter: str, module: str) -> bool:
    """Whether the parameter belongs to the module, which peft names by the end of its path."""
    return f".{module}." in f".{parameter}"


# -------------------------------------------------------------------------------------------------------------- off, on


@contextlib.contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its adapter inside the block, where nothing of it requires a gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def changes_nothing(model: PreTrainedModel) -> bool:
    """Whether the model with its adapter is the model without: B is zero, and nothing but the adapter is trained."""
    parts = trainable(model)
    return all(map(of_adapter, parts)) and not any(
        bool(weight.any()) for name, weight in parts.items() if ".lora_B." in name or ".lora_embedding_B." in name
    )


@contextlib.contextmanager
def adapter_dropout(model: PreTrainedModel, *key: int | str) -> Iterator[None]:
    """The dropout of the adapter inside the block, drawn from ``key``; nothing where it has none."""
    drops = [
        part for name, part in model.named_modules() if ".lora_dropout." in f".{name}" and isinstance(part, nn.Dropout)
    ]
    if not drops:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*key))
        for part in drops:
            part.train()
        try:
            yield
        finally:
            for part in drops:
                part.eval()


# ---------------------------------------------------------------------------------------------------------------- files


def adapter_file(source: str, name: str) -> Path | None:
    """A file of the adapter at a directory or hub id; None where it has none of this name."""
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def adapter_config(source: str) -> dict[str, Any] | None:
    """What ``adapter_config.json`` holds; None where there is none. Raises :class:`ModelError` where it is none of
    LoRA's."""
    file = adapter_file(source, CONFIG)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{CONFIG} is not valid JSON", where=source) from error
    if not isinstance(found, dict) or not isinstance(found.get("base_model_name_or_path"), str):
        raise ModelError(f"{CONFIG} does not name its base (base_model_name_or_path)", where=source)
    if found.get("peft_type") != "LORA":
        raise ModelError(f"an adapter of the kind {found.get('peft_type')!r}; only LoRA is read", where=source)
    return found


def lora_config(source: str) -> Any:
    """peft's configuration of the adapter at ``source``."""
    prepare_peft(source)
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on settings of newer versions, which change no weight
        config: Any = LoraConfig.from_peft_type(**(adapter_config(source) or {}))
    config.inference_mode = False
    return config


def load_adapter(model: PreTrainedModel, source: str) -> None:
    """Put the adapter at ``source`` into ``model``, its base. Raises :class:`ModelError` where the two do not fit."""
    prepare_peft(source)
    file = adapter_file(source, WEIGHTS)
    if file is None:
        raise ModelError(f"no weights: {WEIGHTS} is missing (a pickle is not loaded)", where=source)
    try:
        inject(model, lora_config(source))
        read_adapter(model, file)
    except ModelError as error:
        error.at(source)
        raise


@torch.no_grad()
def read_adapter(model: PreTrainedModel, file: Path) -> None:
    """Give the adapter of ``model`` the weights in a file of :func:`save_adapter`, or of peft: all of them, or a
    :class:`ModelError`."""
    from peft import set_peft_model_state_dict

    tensors, parts = {key.removeprefix(PREFIX): value for key, value in load_file(file).items()}, trainable(model)
    whole = {name: weight for name, weight in parts.items() if not of_adapter(name)}
    try:
        for name, weight in whole.items():
            weight.copy_(tensors.pop(name))
        found: Any = set_peft_model_state_dict(model, tensors, NAME)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter does not fit its base ({reason_of(error)})") from error
    lacking = sorted(key for key in found.missing_keys if of_adapter(key)) + list(found.unexpected_keys)
    if lacking:
        raise ModelError(f"the adapter does not fit its base ({len(lacking)} weights, first {lacking[0]})")
    broken = [name for name, weight in parts.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(f"{len(broken)} weights of the adapter are not finite, the first is {broken[0]}")


def of_adapter(name: str) -> bool:
    """Whether the parameter of this name is of the adapter's layers."""
    return f".{NAME}." in name or name.endswith(f".{NAME}")


def save_adapter(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter of ``model`` in peft's layout; ``weights`` are those of :func:`trainable`, unless given the
    model's own. The same adapter gives the same bytes."""
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    config = cast(Any, model).peft_config[NAME]
    given = dict(trainable(model) if weights is None else weights)
    own = {name: weight for name, weight in given.items() if of_adapter(name)}
    saved = get_peft_model_state_dict(model, state_dict=own, adapter_name=NAME, save_embedding_layers=False)
    saved |= {name: weight for name, weight in given.items() if name not in own}
    tensors = {f"{PREFIX}{name}": weight.detach().cpu().contiguous() for name, weight in sorted(saved.items())}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    (directory / CONFIG).write_text(
        json.dumps(plain | {"inference_mode": True}, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the adapter to the weights, W + s B A, rounded to their precision, and remove its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            cast(Any, layer).merge(safe_merge=True, adapter_names=[NAME])
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
    del model.peft_config
