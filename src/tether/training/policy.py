"""The loop around a step of PPO or GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel

from tether.algorithms.optimise import Guard
from tether.config import RunOptions, Steps
from tether.data.batching import Cursor
from tether.models.reference import Reference
from tether.models.trainable import trainable
from tether.runtime.recorder import Recorder
from tether.training.common import Loaded, Task, finish, held_out_comparison, journaled, located, save_policy
from tether.types import Generator, Prompt, Sampling, Scorer, StepResult
from tether.world import World


class TrainedPolicy(Protocol):
    """What the loop reads of an algorithm's state."""

    policy: PreTrainedModel
    reference: Reference
    cursor: Cursor
    guard: Guard
    step: int
    total_steps: int


class PolicyStep(Protocol):
    """An algorithm's ``step`` with its state and configuration filled in."""

    def __call__(
        self, prompts: Sequence[Prompt], *, generator: Generator, scorer: Scorer, world: World
    ) -> StepResult: ...


def run_policy(state: TrainedPolicy, step: PolicyStep, task: Task, *, length: Steps, recorder: Recorder) -> None:
    """All steps that are left."""
    title = recorder.progress.title
    task.engine.load_weights(state.step, trainable(state.policy).items())
    generator, scorer = journaled(task, recorder)
    while state.step < state.total_steps:
        with located(f"{title} step {state.step + 1}"), state.cursor.rollback_on_error():
            prompts = state.cursor.take(task.prompts, length.prompts_per_step)
            result = step(prompts, generator=generator, scorer=scorer, world=recorder.world)
        recorder.record(state.step, result, last=state.step == state.total_steps)
    with located(title):
        state.guard.require_sound_end()


def conclude(
    state: TrainedPolicy, loaded: Loaded, task: Task, *, sampling: Sampling, run: RunOptions, recorder: Recorder
) -> None:
    """Save the policy, compare it with its reference, and sum up."""
    save_policy(loaded, recorder)
    evaluation = held_out_comparison(loaded, task, state.reference, sampling, run.seed)
    finish(recorder, {"steps": state.step, "last": recorder.row, "evaluation": evaluation}, quiet=run.quiet)
