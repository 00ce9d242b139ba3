"""What a checkpoint holds, in files and back: tensors as safetensors, everything else as JSON.

Weights of the model that is trained are in the Hugging Face layout under ``model/``, of an adapter in peft's; of other
modules what is not frozen, optimizer tensors,
float32 masters of bfloat16 weights, best-so-far weights and the experience of an unfinished update are in
``tensors.safetensors``; the rest is in ``state.json``. What follows from the run's configuration is not saved: the
reference, and how many steps there are; nor are fields marked :data:`tether.types.UNSAVED`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import RunError
from tether.models.adapters import WEIGHTS, is_adapted, read_adapter
from tether.models.loading import load_pretrained
from tether.models.masters import masters
from tether.models.saving import save_weights
from tether.models.trainable import changing, trainable
from tether.observers import Monitor
from tether.runtime.json_text import exact_json, read_exact
from tether.types import HOST, UNSAVED

MODEL, TENSORS, PLAIN = "model", "tensors.safetensors", "state.json"
DERIVED = ("reference", "total_steps")
"""Fields that follow from the configuration, in every state of an algorithm."""
HOST_DEVICE = torch.device("cpu")
ALGORITHM, MONITORS = "algorithm", "monitors"
"""The parts of a :class:`RunState`, as its files name them."""


@dataclass(frozen=True)
class RunState:
    """All that a resumed run needs."""

    algorithm: Any
    """The algorithm's ``State``."""
    monitors: tuple[Monitor, ...] = ()
    """Each with its ``state``; their names differ."""

    def __post_init__(self) -> None:
        names = [monitor.name for monitor in self.monitors]
        if len(set(names)) < len(names):
            raise ValueError(f"monitors need names that differ, found {', '.join(names)}")
        for monitor in self.monitors:
            if not dataclasses.is_dataclass(monitor.state) or isinstance(monitor.state, type):
                raise TypeError(f"the state of the monitor {monitor.name} must be a dataclass, found {monitor.state!r}")
            if taken := {entry.name for entry in dataclasses.fields(monitor.state)} & set(DERIVED):
                raise ValueError(f"the state of the monitor {monitor.name} needs another name for {taken.pop()!r}")


@dataclass
class Snapshot:
    """A state taken apart, ready to be written."""

    model: PreTrainedModel | None = None
    """For its class and configuration; the weights are in ``weights``."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(state: RunState, *, copy: bool = False) -> Snapshot:
        """All that ``state`` holds, in the memory of the host: a ``copy``, or on a CPU the state's own tensors."""
        snapshot = Snapshot()
        plain = {
            ALGORITHM: snapshot._fields(state.algorithm, f"{ALGORITHM}."),
            MONITORS: {
                monitor.name: snapshot._fields(monitor.state, f"{MONITORS}.{monitor.name}.")
                for monitor in state.monitors
            },
        }
        snapshot.plain = deepcopy(plain)
        tied: dict[int, Tensor] = {}  # stay one tensor, so that they are saved once
        for name, weight in snapshot.weights.items():
            if weight.data_ptr() not in tied:
                tied[weight.data_ptr()] = on_host(weight, copy=copy)
            snapshot.weights[name] = tied[weight.data_ptr()]
        snapshot.tensors = {name: on_host(tensor, copy=copy) for name, tensor in snapshot.tensors.items()}
        return snapshot

    def write(self, directory: Path) -> None:
        """The files, into a directory that exists."""
        if self.model is not None:
            save_weights(self.model, directory / MODEL, self.weights)
        save_file(self.tensors, directory / TENSORS)
        (directory / PLAIN).write_text(exact_json(self.plain, indent=1), encoding="utf-8")

    def _fields(self, value: Any, prefix: str) -> dict[str, Any]:
        """The plain part of a dataclass; its tensors are stored under their names."""
        plain = {}
        for entry in dataclasses.fields(value):
            if not saved_field(entry):
                continue
            inner = getattr(value, entry.name)
            if isinstance(inner, nn.Module):
                self._module(inner, f"{prefix}{entry.name}")
            else:
                plain[entry.name] = self._value(inner, f"{prefix}{entry.name}")
        return plain

    def _module(self, module: nn.Module, name: str) -> None:
        if module is self.model:  # a state within the state trains the same one
            return
        self.tensors |= {f"{name}.master.{key}": tensor for key, tensor in masters(module).items()}
        if isinstance(module, PreTrainedModel):
            assert self.model is None, "a state trains one model"
            weights = trainable(module) if is_adapted(module) else module.state_dict()
            self.model, self.weights = module, dict(weights)
        else:
            self.tensors |= {f"{name}.{key}": tensor for key, tensor in changing(module).items()}

    def _value(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            self.tensors[name] = value
            return None
        if isinstance(value, torch.optim.Optimizer):
            saved = value.state_dict()
            return {"param_groups": saved["param_groups"], "state": self._value(saved["state"], name)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._fields(value, f"{name}.")
        if isinstance(value, dict):
            return {key: self._value(inner, f"{name}.{key}") for key, inner in value.items()}
        return value


def restore(state: RunState, directory: Path) -> None:
    """Make ``state``, freshly created from the configuration, what was saved in ``directory``. A monitor that the
    checkpoint does not know keeps its fresh state."""
    plain = read_exact((directory / PLAIN).read_text(encoding="utf-8"))
    saved = Saved(directory, load_file(directory / TENSORS))
    if lacking := plain[MONITORS].keys() - {monitor.name for monitor in state.monitors}:
        raise RunError(
            f"the run has monitors that this process lacks: {', '.join(sorted(lacking))}",
            hint="resume it from Python: the call that began it, with monitors= and resume=True",
        )
    saved.fill(state.algorithm, plain[ALGORITHM], f"{ALGORITHM}.")
    for monitor in state.monitors:
        if monitor.name in plain[MONITORS]:
            name = f"{MONITORS}.{monitor.name}"
            monitor.state = saved.build(type(monitor.state), plain[MONITORS][monitor.name], name, device=None)


@dataclass
class Saved:
    """The files of a state, on their way back into one."""

    directory: Path
    tensors: Mapping[str, Tensor]
    model: PreTrainedModel | None = None
    """The model that is trained, once its weights are restored."""

    def fill(self, target: Any, plain: Mapping[str, Any], prefix: str) -> None:
        """Set every field of the dataclass ``target``; modules, optimizers and dataclasses that can change keep their
        identity."""
        hints = typing.get_type_hints(type(target))
        for entry in dataclasses.fields(target):
            name, current = f"{prefix}{entry.name}", getattr(target, entry.name)
            if not saved_field(entry):
                continue
            if isinstance(current, nn.Module):
                self._fill_module(current, below(self.tensors, name))
            elif isinstance(current, torch.optim.Optimizer):
                fill_optimizer(current, plain[entry.name], below(self.tensors, name))
            elif dataclasses.is_dataclass(current) and not isinstance(current, type) and not frozen(current):
                self.fill(current, plain[entry.name], f"{name}.")
            else:
                value = self.build(hints[entry.name], plain[entry.name], name, device=device_of(target))
                setattr(target, entry.name, value)

    def _fill_module(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        if module is self.model:  # a state within the state trains the same one
            return
        if isinstance(module, PreTrainedModel):
            assert self.model is None, "a state trains one model"
            self.model = module
            load_weights(module, self.directory)
        else:
            module.load_state_dict({key: tensors[key] for key in changing(module)}, strict=False)
        with torch.no_grad():
            for key, master in masters(module).items():
                master.copy_(tensors[f"master.{key}"])

    def build(self, hint: Any, plain: Any, name: str, *, device: torch.device | None) -> Any:
        """A value of type ``hint`` from its plain part and the tensors whose names begin with ``name``."""
        if hint is Tensor:
            return self.tensors[name].to(device)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(hint, types.UnionType) or origin is typing.Union:
            inner = next(one for one in arguments if one is not types.NoneType)
            absent = name not in self.tensors if inner is Tensor else plain is None
            return None if absent else self.build(inner, plain, name, device=device)
        if origin is dict:
            return {
                arguments[0](key): self.build(arguments[1], value, f"{name}.{key}", device=device)
                for key, value in plain.items()
            }
        if origin is tuple:
            return tuple(plain)
        cls = origin or hint
        if dataclasses.is_dataclass(cls):
            given = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
            hints = {key: given.get(one, one) for key, one in typing.get_type_hints(cls).items()}
            values = {
                entry.name: self.build(
                    hints[entry.name],
                    plain[entry.name],
                    f"{name}.{entry.name}",
                    device=HOST_DEVICE if entry.metadata == HOST else device,
                )
                for entry in dataclasses.fields(cls)
                if saved_field(entry)
            }
            return typing.cast(Any, cls)(**values)
        return plain


def load_weights(model: nn.Module, directory: Path) -> None:
    """Give ``model`` the weights of the model that was saved in ``directory``; one with an adapter, the adapter's."""
    assert isinstance(model, PreTrainedModel), "what a state trains is a model of transformers"
    if is_adapted(model):
        read_adapter(model, directory / MODEL / WEIGHTS)
        return
    saved = load_pretrained(type(model), str(directory / MODEL), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def fill_optimizer(optimizer: torch.optim.Optimizer, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Its param groups, and its state: tensors are named INDEX.KEY, all else is in ``plain``."""
    state = {
        int(index): {key: tensors.get(f"{index}.{key}", value) for key, value in entries.items()}
        for index, entries in plain["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def saved_field(entry: dataclasses.Field[Any]) -> bool:
    """Whether checkpoints hold a field."""
    return entry.name not in DERIVED and entry.metadata != UNSAVED


def on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()


def below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``name.``, without it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def frozen(value: Any) -> bool:
    return bool(type(value).__dataclass_params__.frozen)


def device_of(state: Any) -> torch.device | None:
    """The device of the first module of a state; None where it holds none."""
    modules = (
        value for entry in dataclasses.fields(state) if isinstance(value := getattr(state, entry.name), nn.Module)
    )
    return next((next(module.parameters()).device for module in modules), None)
