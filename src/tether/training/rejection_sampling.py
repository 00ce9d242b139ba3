"""``tether rejection-sampling``: best of N, imitated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tether.algorithms import rejection_sampling
from tether.config import PromptOptions, RunOptions, require_evaluations
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.models.trainable import trainable
from tether.observers import Hook, Monitor
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.training.common import NEW, Start, load, located, open_run
from tether.training.estimate import extent_of
from tether.training.held_out import HeldOut, held_out_of
from tether.training.policy import conclude, early_stopping
from tether.training.task import Task, journaled, load_task
from tether.types import Metrics, StepResult


@dataclass(frozen=True, kw_only=True)
class RejectionSampling:
    """Sample N completions per prompt, keep the best K, fine-tune on them."""

    model: str
    """Policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    rejection_sampling: rejection_sampling.Config = field(default_factory=rejection_sampling.Config)

    def __post_init__(self) -> None:
        require_evaluations(self.run, self.task.evaluation)


def train(
    command: RejectionSampling, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()
) -> None:
    """Load, run all rounds, save, compare with the reference, and sum up."""
    run, config = command.run, command.rejection_sampling
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = rejection_sampling.State.create(
        loaded.model,
        config,
        reference=reference_of(loaded.model),
        prompts=len(task.prompts),
        seed=run.seed,
        optimizer=start.given.optimizer,
    )
    recorder = open_run(
        command,
        start,
        loaded,
        title="rejection-sampling",
        state=RunState(state, (*task.monitors(), early_stopping(run, command.task.evaluation, window=1), *monitors)),
        total=config.rounds,
        rollouts_every=command.task.rollouts_every,
        hooks=hooks,
        extent=extent_of(loaded.model, run, *task.extent),
    )
    held_out = held_out_of(task, loaded, state, config.sampling, recorder)
    with recorder.session(stop_after=run.stop_after_seconds):
        run_rounds(state, task, config=config, recorder=recorder, held_out=held_out)
        conclude(loaded, held_out, counted="rounds", run=run, recorder=recorder)


def run_rounds(
    state: rejection_sampling.State,
    task: Task,
    *,
    config: rejection_sampling.Config,
    recorder: Recorder,
    held_out: HeldOut,
) -> None:
    """All rounds that are left. A round is a row; its fine-tuning steps are in ``sft.jsonl``, what it imitated in
    ``selected.jsonl``. Checkpoints fall due by fine-tuning steps, of which a round may have many.
    """
    task.engine.load_weights(state.round, trainable(state.policy).items())
    generator, scorer = journaled(task, recorder)

    def on_step(metrics: Metrics) -> None:
        recorder.append("sft.jsonl", [{"round": float(state.round + 1), **metrics}])
        if recorder.save_every and state.tuning.step % recorder.save_every == 0:
            recorder.save(within_step=True)

    while state.round < config.rounds and not recorder.ended:
        number = state.round + 1
        with located(f"rejection-sampling round {number}"):
            result = rejection_sampling.step(
                state,
                task.prompts,
                generator=generator,
                scorer=scorer,
                config=config,
                on_step=on_step,
                world=recorder.world,
                evaluate=held_out.due(number, config.rounds),
            )
        recorder.append("selected.jsonl", [as_row(number, one) for one in result.selected])
        found = StepResult(metrics=result.metrics, groups=result.groups, figures=result.figures)
        recorder.record(number, found, last=True)
    with located("rejection-sampling"):
        state.tuning.guard.require_sound_end()


def as_row(number: int, one: rejection_sampling.Selected) -> dict[str, Any]:
    """A completion that round ``number`` imitated, as a row of ``selected.jsonl``: data for ``tether sft``."""
    prompt, completion = one.prompt, one.completion
    turn = [{"role": "assistant", "content": completion.text}]
    return {
        "round": number,
        "prompt": list(prompt.messages) if prompt.messages else prompt.text,
        "completion": turn if prompt.messages else completion.text,
        "score": one.total,
        "prompt_ids": list(prompt.ids),
        "completion_ids": list(completion.ids),
        "mask": list(completion.mask),
    }
