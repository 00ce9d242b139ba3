"""A new algorithm is its own file, its training file and one row of the table.

This file is all three, and no other refers to it: the algorithm trains, leaves a run directory, is interrupted and
resumed bit for bit, and its run is drawn.

REINFORCE with the average reward of earlier steps as baseline: loss = -mean_b (R_b - baseline) * sum_t logp_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from commandline import numbers, read_rows, workspace
from tether.algorithms.optimise import Guard, Optim, adamw
from tether.algorithms.pending import evaluated
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import batch_of, lengths_of, rollout_figures, scores_of
from tether.cli import main
from tether.commands import TABLE, Command
from tether.config import PromptOptions, RunOptions, Steps
from tether.data.batching import Cursor
from tether.errors import ConfigError
from tether.figures import reduce
from tether.models.flops import forward_flops, shape_of
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs
from tether.models.reference import Reference, reference_of
from tether.models.trainable import trainable
from tether.observers import Monitor
from tether.ops.masked import masked_sum
from tether.runtime.state import RunState
from tether.seeds import derive_seed
from tether.training.common import NEW, Start, load, open_run
from tether.training.held_out import held_out_of
from tether.training.policy import conclude, early_stopping, run_policy
from tether.training.task import load_task
from tether.types import Generator, Metrics, Prompt, Sampling, ScoredGroup, Scorer, StepResult, make_requests
from tether.world import ALONE, World

# -- the algorithm ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of REINFORCE."""

    group_size: int = 4
    """Completions per prompt."""
    momentum: float = 0.9
    """Decay of the average reward that is the baseline."""
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=lambda: Optim(learning_rate=1e-3))

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"momentum must lie in [0, 1)": 0 <= self.momentum < 1})


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    policy: PreTrainedModel
    reference: Reference
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    guard: Guard
    seed: int
    total_steps: int
    step: int = 0
    baseline: Tensor | None = None  # []
    """Average reward of earlier steps; None before the first."""
    loss: float | None = None
    """Of the current step's update, once it is made; None between steps."""

    @staticmethod
    def create(policy: PreTrainedModel, config: Config, *, prompts: int, total_steps: int, seed: int) -> State:
        return State(
            policy=policy,
            reference=reference_of(policy),
            optimizer=adamw([(policy.parameters(), config.optim.learning_rate or 1e-3)], config.optim),
            cursor=Cursor(prompts, seed),
            guard=Guard(token_budget=4096),
            seed=seed,
            total_steps=total_steps,
        )


def step(
    state: State,
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    config: Config,
    world: World = ALONE,
    evaluate: Callable[[], Metrics] | None = None,
) -> StepResult:
    """One step: roll out, score, update. One that is interrupted in ``evaluate`` has been updated, and is not again."""
    clock = PhaseClock(state.policy.device)
    with clock.phase("generate"):
        seed = derive_seed(state.seed, "rollout", state.step)
        asked = make_requests(prompts, group_size=config.group_size, seed=seed)
        rollouts = generator.generate(asked, sampling=config.sampling)
    with clock.phase("score"):
        groups = tuple(scorer.score(rollouts))
    with clock.phase("update"):
        if state.loss is None:
            state.loss = update(state, groups, config)
        generator.load_weights(state.step + 1, trainable(state.policy).items())
    evaluation = evaluated(evaluate, clock)
    flops = forward_flops(shape_of(state.policy), lengths_of(groups))
    metrics = reduce(rollout_figures(groups) | clock.figures(), world)
    metrics |= {"loss": state.loss, "flops/update": 3 * flops, **evaluation}
    state.loss, state.step = None, state.step + 1
    return StepResult(metrics=metrics, groups=groups)


def update(state: State, groups: Sequence[ScoredGroup], config: Config) -> float:
    """One optimizer step; gives the loss."""
    batch, rewards = batch_of(groups, state.policy.device), scores_of(groups, state.policy.device).flatten()
    baseline = rewards.mean() if state.baseline is None else state.baseline
    (logp,) = completion_logprobs(state.policy, batch, temperature=config.sampling.temperature)
    loss = -((rewards - baseline) * masked_sum(logp, batch.mask, dim=1)).mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.baseline = config.momentum * baseline + (1 - config.momentum) * rewards.mean()
    return float(loss.detach())


# -- its training file -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Improve a policy by REINFORCE."""

    model: str
    """Policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    reinforce: Config = field(default_factory=Config)


def train(command: Reinforce, start: Start = NEW, *, monitors: Sequence[Monitor] = ()) -> None:
    run, config = command.run, command.reinforce
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = State.create(
        loaded.model, config, prompts=len(task.prompts), total_steps=command.length.steps, seed=run.seed
    )
    recorder = open_run(
        command,
        start,
        loaded,
        title="reinforce",
        state=RunState(state, (early_stopping(run, command.task.evaluation), *monitors)),
        total=state.total_steps,
        rollouts_every=command.task.rollouts_every,
    )
    held_out = held_out_of(task, loaded, state, config.sampling, recorder)
    one = partial(step, state, config=config)
    with recorder.session(stop_after=run.stop_after_seconds):
        run_policy(state, one, task, length=command.length, recorder=recorder, held_out=held_out)
        conclude(loaded, held_out, counted="steps", run=run, recorder=recorder)


# -- its row in the table --------------------------------------------------------------------------------------------

WITH_REINFORCE = (
    *TABLE,
    Command(
        name="reinforce",
        group="train",
        summary="improve a policy by REINFORCE",
        options=f"{__name__}:Reinforce",
        run=f"{__name__}:train",
        resumable=True,
    ),
)
LINE = (
    "reinforce --prompts p.jsonl --eval-prompts held_prompts.jsonl --eval-every 2 --keep-best=-eval/kl "
    "--reward r.py:fn --prompts-per-step 2 "
    "--momentum 0.5 --max-new-tokens 5 --steps 5 --save-every 2 --quiet"
)


def tether(line: str) -> int:
    return main(line.split(), WITH_REINFORCE)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def test_it_is_in_the_help(capsys):
    assert tether("--help") == 0
    assert "\n  reinforce           improve a policy by REINFORCE\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tether("reinforce --help")
    shown = capsys.readouterr().out
    assert "--momentum FLOAT" in shown
    assert "--kl-coef" not in shown
    assert tether(f"{LINE} --momentum 2 --model m --out o") == 2
    assert "momentum must lie in [0, 1)" in capsys.readouterr().err


def test_it_trains_is_interrupted_and_resumed_bit_for_bit_and_drawn(here, tiny, capfd):
    assert tether(f"{LINE} --model {tiny} --out whole") == 0
    text = (here / "r.py").read_text()
    (here / "r.py").write_text(f"import os, signal\ncalls = []\n{text.replace('return', STOP)}")
    assert tether(f"{LINE} --model {tiny} --out cut") == 75
    assert "resume with 'tether resume cut'" in capfd.readouterr().err
    (here / "r.py").write_text(text)
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    rows = read_rows(here / "cut" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert tether("report cut") == 0
    assert "tether reinforce" in (here / "cut" / "report.html").read_text()


STOP = "calls.append(1)\n    if len(calls) == 3: os.kill(os.getpid(), signal.SIGTERM)\n    return"
"""In the reward function: a request to stop at its third call, which is in the evaluation of the second step."""
