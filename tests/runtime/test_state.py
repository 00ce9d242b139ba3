"""What is built again from a checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import random_groups, sampled
from tether.algorithms.experience import GroupExperience
from tether.algorithms.rollouts import batch_of
from tether.errors import RunError
from tether.runtime.state import RunState, Saved, Snapshot, restore


def test_tensors_that_decide_shapes_come_back_to_the_host_and_the_others_to_the_device():
    """On the device "meta", which is no CPU either."""
    batch = batch_of(random_groups(2, 2), torch.device("cpu"))
    logp = torch.zeros(batch.mask.shape)
    rows = torch.zeros(4)
    made = GroupExperience(sampled=sampled(batch, logp), advantages=rows, kl_weight=rows)
    snapshot = Snapshot()
    plain = snapshot._fields(made, "x.")
    found = Saved(Path(), snapshot.tensors).build(GroupExperience, plain, "x", device=torch.device("meta"))
    on_device = {"ids": found.sampled.batch.ids, "mask": found.sampled.loss_mask, "old_logp": found.sampled.old_logp}
    assert {name: tensor.device.type for name, tensor in on_device.items()} == dict.fromkeys(on_device, "meta")
    for name in ("prompt_lengths", "completion_lengths", "prompt_index"):
        assert torch.equal(getattr(found.sampled.batch, name), getattr(batch, name))
    found.rows(torch.tensor([1, 3]))  # which would mix devices otherwise


@dataclass
class Odd:
    counts: dict[int, float] = field(default_factory=lambda: {3: 0.5})
    names: tuple[str, ...] = ("a", "b")
    seen: Tensor | None = None


@dataclass
class Watcher:
    state: object
    name: str = "watcher"

    def watch(self, step, result):
        return ()


def test_a_monitors_state_is_the_one_it_was():
    for state in (Odd(), Odd(counts={}, names=(), seen=torch.arange(3))):
        snapshot = Snapshot()
        plain = snapshot._fields(state, "monitors.watcher.")
        found = Saved(Path(), snapshot.tensors).build(Odd, plain, "monitors.watcher", device=None)
        assert (found.counts, found.names) == (state.counts, state.names)
        assert (found.seen is None) == (state.seen is None)
        assert found.seen is None or torch.equal(found.seen, state.seen)


@dataclass
class Taken:
    reference: float = 0.0


def test_a_state_that_could_not_be_saved_is_refused_at_once():
    with pytest.raises(TypeError, match="must be a dataclass, found None"):
        RunState(None, (Watcher(None),))
    with pytest.raises(ValueError, match="another name for 'reference'"):
        RunState(None, (Watcher(Taken()),))


def test_a_monitor_that_is_missing_when_a_run_is_resumed_is_an_error(tmp_path):
    (tmp_path / "state.json").write_text('{"algorithm": {}, "monitors": {"watcher": {}}}')
    save_file({}, tmp_path / "tensors.safetensors")
    with pytest.raises(RunError, match=r"has monitors that this process lacks: watcher; resume it from Python"):
        restore(RunState(None), tmp_path)
