"""Models without memory, and a count of the bytes that they would take.

On torch's device ``meta`` a tensor has a shape and a dtype, and operations compute those of their results. So a forward
and backward pass can be run to see what it would allocate, in a second for a model of any size: with the layers, the
packing, the adapters and the checkpointing of activations that the real pass has. What an operation allocates within
itself is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from tether.models.adapters import CONFIG, NAME, inject, is_adapted, lora_config
from tether.models.classifiers import classifier_class
from tether.models.experts import route_in_float32
from tether.models.flops import weights_of
from tether.models.loading import config_at, resolve, split_adapter
from tether.models.packing import Biases, Block, GroupLayout, Pack, pack
from tether.models.policy import packed_states
from tether.models.quantised import HEADS, Quantise
from tether.models.unpacked import is_unpacked, set_unpacked
from tether.types import Batch

META = torch.device("meta")
BITS_PER_WEIGHT = {"4bit": 4 + 8 / 64 + 32 / (64 * 256), "8bit": 8.0}
"""Of quantised weights: NF4 has a scale of 8 bits per 64 weights, and one of 32 bits per 256 of those."""


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside ``with``, until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _grouped_product if func is torch.ops.aten._grouped_mm.default else func
        found = run(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._count(value)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or the result of an operation in place
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    @contextlib.contextmanager
    def held(self, parts: dict[str, int], name: str) -> Iterator[None]:
        """Add what the block allocates and does not release to ``parts[name]``."""
        before = self.now
        yield
        parts[name] = parts.get(name, 0) + self.now - before

    @contextlib.contextmanager
    def at_most(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Put the most that the block allocates at any time, above what there was before it, in ``peaks[name]``."""
        before, self.peak = self.now, self.now
        yield
        peaks[name] = max(peaks.get(name, 0), self.peak - before)


def _grouped_product(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    """The product of tokens with their experts, which on ``meta`` takes bfloat16 alone."""
    found: Tensor = torch.ops.aten._grouped_mm.default(x.bfloat16(), weight.bfloat16(), *rest, **options)
    return found.to(x.dtype)


@contextlib.contextmanager
def without_memory() -> Iterator[Allocated]:
    """Tensors made inside have no memory, and are counted."""
    with Allocated() as allocated, META:
        yield allocated


@dataclass(frozen=True)
class Form:
    """What the memory of a model depends on."""

    config: Any
    adapter: Any = None
    """peft's configuration of its adapter, if it has one."""
    unpacked: bool = False
    """Whether its rows are padded (:mod:`tether.models.unpacked`)."""

    @staticmethod
    def of(model: PreTrainedModel) -> Form:
        """That of a model in memory."""
        return Form(model.config, cast(Any, model).peft_config[NAME] if is_adapted(model) else None, is_unpacked(model))

    @staticmethod
    def named(name: str) -> Form:
        """That of a directory, which needs to hold its configuration alone, a hub id or ``base``."""
        path = Path(name)
        if (path / "config.json").is_file() and not (path / CONFIG).is_file():
            return Form(config_at(name))
        base, adapter = split_adapter(name)
        return Form(config_at(resolve(base), name=base), None if adapter is None else lora_config(adapter))


def shell(form: Form, *, dtype: torch.dtype, classifier: bool = False) -> PreTrainedModel:
    """A model of this form, or the classifier on its trunk, as it would be loaded; to be called inside
    :func:`without_memory`."""
    config = copy.deepcopy(form.config)
    vars(config).pop("quantization_config", None)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, Mapping) and rope.get("rope_type") in ("longrope", "dynamic"):
        # these look at the positions to choose their factors, which change no shape
        text.rope_parameters = {**rope, "rope_type": "default"}
    if classifier:
        config.num_labels = 1
    kind: Any = classifier_class(config) if classifier else AutoModelForCausalLM
    built = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    model: PreTrainedModel = built(config, dtype=dtype)
    model.config.pad_token_id = None  # else the library looks for it among the ids
    route_in_float32(model)
    set_unpacked(model, form.unpacked)
    if form.adapter is not None:
        inject(model, copy.deepcopy(form.adapter))
    return model.eval()


def saved_by_quantising(model: PreTrainedModel, kind: Quantise) -> int:
    """Bytes that weights of ``kind`` save, less those of the largest layer's product, which has them in full."""
    layers = [
        part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in HEADS
    ]
    counts = [weights_of(layer) for layer in layers]
    full = model.dtype.itemsize
    return int(sum(counts) * (full - BITS_PER_WEIGHT[kind] / 8)) - max(counts) * full


def states(trunk: nn.Module, batch: Batch, *, ends: bool) -> Tensor:
    """The states that :func:`tether.models.policy.completion_states` gives, or with ``ends`` ``final_states``, for a
    batch in real memory, of which only the lengths count."""
    if is_unpacked(trunk):
        hidden: Tensor = trunk(input_ids=batch.ids.to(META), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[: len(batch) if ends else int(batch.completion_lengths.sum())]
    config: Any = trunk.config
    with torch.device("cpu"):
        packed = on_meta(pack(batch, ends=ends), {None, getattr(config.get_text_config(), "sliding_window", None)})
    return packed_states(trunk, packed)[packed.ends if ends else packed.states]


def on_meta(packed: Pack, windows: set[int | None]) -> Pack:
    """``packed`` on ``meta``, with the biases for layers with these ``windows``, which depend on its values."""

    def moved(block: Block, window: int | None) -> Biases:
        own, prefix, branch = (None if bias is None else bias.to(META) for bias in block.biases_for(window))
        return own, prefix, branch

    blocks = (
        replace(block, biases={window: moved(block, window) for window in windows}) for block in packed.layout.blocks
    )
    layout = GroupLayout(tuple(blocks), packed.layout.grids.to(META), packed.layout.places.to(META))
    return replace(
        packed,
        layout=layout,
        **{name: getattr(packed, name).to(META) for name in ("ids", "positions", "states", "ends")},
    )
