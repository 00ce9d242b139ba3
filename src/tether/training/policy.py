"""The loop around a step of PPO or GRPO, and what a policy is left with at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from tether.algorithms.optimise import Guard
from tether.config import EVALUATED_REWARD, EvaluationOptions, RunOptions, Steps
from tether.data.batching import Cursor
from tether.models.reference import Reference
from tether.models.trainable import trainable
from tether.monitor.early_stopping import EarlyStopping
from tether.runtime.recorder import Recorder
from tether.training.common import Loaded, finish, located, save_policy
from tether.training.held_out import HeldOut
from tether.training.task import Task, journaled
from tether.types import Generator, Metrics, Prompt, Scorer, StepResult
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
        self,
        prompts: Sequence[Prompt],
        *,
        generator: Generator,
        scorer: Scorer,
        world: World,
        evaluate: Callable[[], Metrics] | None,
    ) -> StepResult: ...


WINDOW = 3
"""Steps over which the KL of the training samples is averaged, before it is compared with ``stop_kl``."""


def early_stopping(
    run: RunOptions, evaluation: EvaluationOptions, *, window: int = WINDOW, metric: str = EVALUATED_REWARD
) -> EarlyStopping:
    """What ends a run early: the patience watches ``metric`` unless ``keep_best`` names another. It is there without
    limits too, so that a resumed run can be given some."""
    evaluated = bool(evaluation.eval_every)
    return EarlyStopping(
        stop_kl=evaluation.stop_kl,
        kl="eval/kl" if evaluated else "kl",
        window=1 if evaluated else window,
        patience=evaluation.patience,
        metric=run.keep_best or metric,
    )


def run_policy(
    state: TrainedPolicy, step: PolicyStep, task: Task, *, length: Steps, recorder: Recorder, held_out: HeldOut
) -> None:
    """All steps that are left."""
    title = recorder.progress.title
    task.engine.load_weights(state.step, trainable(state.policy).items())
    generator, scorer = journaled(task, recorder)
    while state.step < state.total_steps and not recorder.ended:
        with located(f"{title} step {state.step + 1}"), state.cursor.rollback_on_error():
            prompts = state.cursor.take(task.prompts, length.prompts_per_step)
            evaluate = held_out.due(state.step + 1, state.total_steps)
            result = step(prompts, generator=generator, scorer=scorer, world=recorder.world, evaluate=evaluate)
        recorder.record(state.step, result, last=state.step == state.total_steps)
    with located(title):
        state.guard.require_sound_end()


def conclude(loaded: Loaded, held_out: HeldOut, *, counted: str, run: RunOptions, recorder: Recorder) -> None:
    """Save the policy, which is that of the best step where one is asked for, compare it with its reference, and sum
    up; ``counted`` is what the summary calls the steps."""
    step = recorder.take_best()
    save_policy(loaded, recorder)
    summary = {counted: recorder.recorded, "last": recorder.row, **held_out.comparison(recorder, step)}
    finish(recorder, summary, quiet=run.quiet)
