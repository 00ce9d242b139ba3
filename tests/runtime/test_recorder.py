"""The recorder among several ranks: one writes, what a step cost is that of all, and a stop is agreed on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from helpers import random_groups
from tether.errors import GuardError
from tether.observers import Alarm
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.directory import RunDirectory, read_metrics
from tether.runtime.journal import Journal
from tether.runtime.progress import ProgressLine
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.stop_requests import Interrupted
from tether.types import StepResult
from tether.world import ALONE

METRICS = {"num_tokens": 8.0, "flops/update": 1e3, "time/update": 0.1}


@dataclass
class Two:
    """A world of two ranks: the other one took 10 seconds more and 1 GiB more, and may have something to say."""

    rank: int
    other: bool = False
    size: int = 2

    def any(self, flag):
        return flag or self.other

    def gather(self, value):
        if not isinstance(value, dict):
            return [value, value]
        others = {"seconds": 10.0, "gib": 1.0, "rate": 0.0}
        return [value, {name: type(one)(one.value + others[name]) for name, one in value.items()}]

    def sum(self, value):
        return 2 * value

    def max(self, value):
        return value


@dataclass
class Seen:
    groups: int = 0


@dataclass
class Stopper:
    """Stops a run once it has seen so many groups."""

    enough: int
    name: str = "stopper"
    state: Seen = field(default_factory=Seen)

    def watch(self, step, result):
        self.state.groups += len(result.groups)
        return [Alarm(monitor=self.name, message="enough", stop=True)] if self.state.groups >= self.enough else []


def recorder(path, world, *, monitors=()) -> Recorder:
    directory = RunDirectory(path, {})
    made = Recorder(
        directory=directory,
        checkpoints=Checkpoints(directory.path, None, Kept(last=1, best=None)),
        journal=Journal(directory),
        progress=ProgressLine("ppo", 3, quiet=True),
        state=RunState(None, tuple(monitors)),
        model=torch.nn.Module(),
        device=torch.device("cpu"),
        matrix_rate=1e9,
        world=world,
    )
    made.start()
    return made


def test_a_step_costs_what_its_slowest_rank_and_all_devices_cost(tmp_path):
    one = recorder(tmp_path / "run", Two(rank=0))
    one.record(1, StepResult(metrics=METRICS))
    (row,) = read_metrics(tmp_path / "run")
    assert 10 < row["step_time"] < 20
    assert row["tokens_per_second"] == pytest.approx(8 / row["step_time"])
    assert row["mfu"] == pytest.approx(1e3 / (0.1 * 2e9))  # the FLOPs of both on the devices of both
    alone = recorder(tmp_path / "alone", ALONE)
    alone.record(1, StepResult(metrics=METRICS))
    assert alone.row["step_time"] < 5
    assert alone.row["mfu"] == pytest.approx(1e3 / (0.1 * 1e9))


def test_only_the_first_rank_writes(tmp_path):
    other = recorder(tmp_path / "run", Two(rank=1))
    other.record(1, StepResult(metrics=METRICS), last=True)
    other.append("sft.jsonl", [{"loss": 1.0}])
    other.finish({})
    assert not (tmp_path / "run").exists()
    assert (other.recorded, other.row["step"]) == (1, 1.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_monitors_see_the_completions_of_all_ranks_and_stop_them_alike(tmp_path, rank, monkeypatch):
    groups = tuple(random_groups(2, 2))
    one = recorder(tmp_path / "run", Two(rank=rank), monitors=[Stopper(enough=4)])
    saved = []
    monkeypatch.setattr(one, "save", lambda: saved.append(one.recorded))
    with pytest.raises(GuardError, match=r"^ppo step 1: enough$"):
        one.record(1, StepResult(metrics=METRICS, groups=groups))
    assert saved == [1]
    assert (tmp_path / "run" / "alarms.jsonl").exists() == (rank == 0)


def test_a_request_to_stop_waits_for_the_end_of_a_step(tmp_path, monkeypatch):
    one = recorder(tmp_path / "run", Two(rank=1))
    monkeypatch.setattr("tether.runtime.recorder.asked", lambda: "SIGTERM")
    with pytest.raises(Interrupted, match="SIGTERM"):
        one.record(1, StepResult(metrics=METRICS))
    assert one.recorded == 1
    one.record(3, StepResult(metrics=METRICS))  # after the last step there is only the end of the run


def test_a_metric_that_is_not_finite_is_not_written_and_no_monitor_sees_it(tmp_path):
    one = recorder(tmp_path / "run", ALONE, monitors=[Stopper(enough=0)])
    with pytest.raises(GuardError, match=r"^ppo step 1: kl is not finite \(nan\)$"):
        one.record(1, StepResult(metrics={**METRICS, "kl": float("nan")}))
    assert not (tmp_path / "run").exists()
