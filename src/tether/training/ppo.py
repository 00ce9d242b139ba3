"""``tether ppo``: a policy improved by PPO with a value function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tether.algorithms import ppo
from tether.config import PromptOptions, RunOptions, Steps, require_evaluations, require_minibatches, require_no_dropout
from tether.errors import ConfigError
from tether.models.loading import load_policy
from tether.models.policy import save_critic
from tether.models.reference import reference_of
from tether.observers import Hook, Monitor
from tether.runtime.files import atomic_write
from tether.runtime.state import RunState
from tether.training.common import NEW, Start, load, open_run
from tether.training.estimate import extent_of
from tether.training.held_out import held_out_of
from tether.training.policy import conclude, early_stopping, run_policy
from tether.training.task import load_task

CRITIC = "critic.safetensors"


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Improve a policy by PPO with a value function."""

    model: str
    """Policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    save_critic: bool = False
    """Write the critic too, as critic.safetensors in the run directory."""
    ppo: ppo.Config = field(default_factory=ppo.Config)

    def __post_init__(self) -> None:
        ConfigError.unless(
            self,
            {
                "save_critic needs the policy of the last step: leave keep_best out": not (
                    self.save_critic and self.run.keep_best
                )
            },
        )
        require_evaluations(self.run, self.task.evaluation)
        require_no_dropout(self.run)
        require_minibatches(self.ppo.minibatches, self.length.prompts_per_step * self.ppo.group_size)


def train(command: PPO, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()) -> None:
    """Load, train, save, compare with the reference, and sum up."""
    run, config = command.run, command.ppo
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = ppo.State.create(
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
        title="ppo",
        state=RunState(state, (*task.monitors(), early_stopping(run, command.task.evaluation), *monitors)),
        total=state.total_steps,
        rollouts_every=command.task.rollouts_every,
        hooks=hooks,
        extent=extent_of(loaded.model, run, *task.extent),
    )
    held_out = held_out_of(task, loaded, state, config.sampling, recorder)
    step = partial(ppo.step, state, config=config)
    with recorder.session(stop_after=run.stop_after_seconds):
        run_policy(state, step, task, length=command.length, recorder=recorder, held_out=held_out)
        if command.save_critic and recorder.writes:
            with atomic_write(recorder.directory.path / CRITIC) as unfinished:
                save_critic(state.critic, unfinished)
        conclude(loaded, held_out, counted="steps", run=run, recorder=recorder)
