"""``tether grpo``: a policy improved by GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tether.algorithms import grpo
from tether.config import PromptOptions, RunOptions, Steps, require_evaluations, require_minibatches, require_no_dropout
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.observers import Hook, Monitor
from tether.runtime.state import RunState
from tether.training.common import NEW, Start, load, open_run
from tether.training.estimate import extent_of
from tether.training.held_out import held_out_of
from tether.training.policy import conclude, early_stopping, run_policy
from tether.training.task import load_task


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Improve a policy by GRPO."""

    model: str
    """Policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    grpo: grpo.Config = field(default_factory=grpo.Config)

    def __post_init__(self) -> None:
        require_evaluations(self.run, self.task.evaluation)
        require_no_dropout(self.run)
        require_minibatches(self.grpo.minibatches, self.length.prompts_per_step * self.grpo.group_size)


def train(command: GRPO, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()) -> None:
    """Load, train, save, compare with the reference, and sum up; ``monitors`` watch beside the usual ones."""
    run, config = command.run, command.grpo
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = grpo.State.create(
        loaded.model,
        config,
        reference=reference_of(loaded.model),
        prompts=len(task.prompts),
        total_steps=command.length.steps,
        seed=run.seed,
        optimizer=start.given.optimizer,
    )
    recorder = open_run(
        command,
        start,
        loaded,
        title="grpo",
        state=RunState(state, (*task.monitors(compares=True), early_stopping(run, command.task.evaluation), *monitors)),
        total=state.total_steps,
        rollouts_every=command.task.rollouts_every,
        hooks=hooks,
        extent=extent_of(loaded.model, run, *task.extent),
    )
    held_out = held_out_of(task, loaded, state, config.sampling, recorder)
    step = partial(grpo.step, state, config=config, fresh=partial(state.cursor.take, task.prompts))
    with recorder.session(stop_after=run.stop_after_seconds):
        run_policy(state, step, task, length=command.length, recorder=recorder, held_out=held_out)
        conclude(loaded, held_out, counted="steps", run=run, recorder=recorder)
