"""Small steps of each algorithm that samples, interrupted at any of the places where an interrupt takes effect."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tether import stop_requests
from tether.algorithms import grpo, ppo, sft
from tether.algorithms import rejection_sampling as rs
from tether.algorithms.optimise import Optim
from tether.algorithms.surrogate import Surrogate
from tether.generation import engine, scheduler
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.runtime.recorder import TIMINGS
from tether.runtime.state import RunState, Snapshot
from tether.types import Prompt, Sampling, Score, ScoredGroup

PROMPTS = [Prompt(ids=(0, 70), text="a"), Prompt(ids=(0, 71, 72), text="b")]
OTHERS = [Prompt(ids=(0, 80), text="c"), Prompt(ids=(0, 81, 82), text="d")]
SAMPLING = Sampling(max_new_tokens=3)
OPTIM = Optim(learning_rate=1e-2)
CONFIGS = {
    "grpo": grpo.Config(
        group_size=2,
        epochs_per_step=2,
        entropy_target=9.0,
        micro_batch_tokens=1,
        surrogate=Surrogate(mismatch="mis", mask_truncated=True),
        sampling=SAMPLING,
        optim=OPTIM,
    ),
    "ppo": ppo.Config(
        group_size=2,
        epochs_per_step=1,
        minibatches=2,
        adaptive_kl_target=0.5,
        micro_batch_tokens=1,
        sampling=SAMPLING,
        optim=OPTIM,
    ),
    "ppo-stopped": ppo.Config(
        group_size=2, epochs_per_step=2, target_kl=1e-6, micro_batch_tokens=1, sampling=SAMPLING, optim=OPTIM
    ),
    "rejection-sampling": rs.Config(
        group_size=2, sampling=SAMPLING, sft=sft.Config(epochs=2, batch_size=1, micro_batch_tokens=1, optim=OPTIM)
    ),
}
MODULES = {"grpo": grpo, "ppo": ppo, "ppo-stopped": ppo, "rejection-sampling": rs}


@dataclass
class Points:
    """Counts the points that a step passes, and acts at one of them."""

    at: int = 0
    """The number of that point, from 1; 0 for none."""
    act: Callable[[], None] = field(default=lambda: None)
    passed: list[str] = field(default_factory=list)

    def reach(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) == self.at:
            self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


class Watched:
    """An engine and a scorer with a point before and after each of their calls."""

    def __init__(self, inner: engine.Engine, points: Points) -> None:
        self.engine, self.points = inner, points

    def generate(self, requests, *, sampling):
        self.points.reach("generate")
        groups = self.engine.generate(requests, sampling=sampling)
        self.points.reach("generated")
        return groups

    def load_weights(self, version, weights):
        self.points.reach("load")
        self.engine.load_weights(version, weights)
        self.points.reach("loaded")

    def figures(self):
        return self.engine.figures()

    def score(self, groups):
        """The share of odd ids; none for the second completion of the first prompt, where no reward applies."""
        self.points.reach("score")
        scored = [
            ScoredGroup(
                rollouts=group,
                scores=tuple(
                    Score(total=None if (i, j) == (0, 1) else sum(n % 2 for n in one.ids) / len(one.ids))
                    for j, one in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]
        self.points.reach("scored")
        return scored


class Setting:
    """A fresh state of one algorithm and what its step is given."""

    def __init__(self, name: str, loaded, monkeypatch) -> None:
        self.module, self.config, self.monkeypatch = MODULES[name], CONFIGS[name], monkeypatch
        model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
        steps = {} if self.module is rs else {"total_steps": 3}
        self.state = self.module.State.create(
            model, self.config, reference=reference_of(model), prompts=len(PROMPTS), seed=0, **steps
        )
        with monkeypatch.context() as patch:  # the model is the same every time
            patch.setattr(engine, "check_samples", lambda *_: None)
            self.engine = engine.Engine(model, tokenizer)
        self.evaluations = 0

    def step(self, prompts, points: Points | None = None, *, generator=None, **more):
        """One step whose points are those of ``points``."""
        points = points or Points()
        watched = Watched(self.engine, points)

        real = stop_requests.check

        def check() -> None:
            points.reach("check")
            real()

        def evaluate():
            points.reach("evaluate")
            self.evaluations += 1
            weight = float(next(self.state.policy.parameters()).detach().double().sum())
            points.reach("evaluated")
            return {"eval/weight": weight}

        with self.monkeypatch.context() as patch:
            patch.setattr(stop_requests, "check", check)
            patch.setattr(scheduler, "check", check)
            return self.module.step(
                self.state,
                prompts,
                generator=generator or watched,
                scorer=watched,
                config=self.config,
                evaluate=evaluate,
                **more,
            )

    def held(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """All that a checkpoint of the state holds."""
        snapshot = Snapshot.of(RunState(self.state), copy=True)
        return json.loads(json.dumps(snapshot.plain)), {**snapshot.weights, **snapshot.tensors}


def load(directory: str):
    return load_policy(directory)


def reported(result) -> tuple[dict[str, float], Any, Any]:
    """What a step says, but for how long it took."""
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(TIMINGS)}
    return metrics, result.groups, result.figures


def same(one, other) -> bool:
    """Whether two states hold the same, bit by bit."""
    (plain, tensors), (other_plain, other_tensors) = one, other
    return (
        without_times(plain) == without_times(other_plain)
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())
    )


def without_times(plain):
    """A plain state without the seconds of the steps of a fine-tuning."""
    if isinstance(plain, dict):
        return {key: without_times(value) for key, value in plain.items() if not str(key).startswith(TIMINGS)}
    return [without_times(value) for value in plain] if isinstance(plain, list) else plain
