"""``tether rejection-sampling``: best of N, imitated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tether.algorithms import rejection_sampling
from tether.config import PromptOptions, RunOptions
from tether.models.loading import load_policy
from tether.models.trainable import trainable
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.training.common import (
    NEW,
    Start,
    Task,
    finish,
    held_out_comparison,
    journaled,
    load,
    load_task,
    located,
    open_run,
    save_policy,
)
from tether.types import Metrics, Monitor, StepResult


@dataclass(frozen=True, kw_only=True)
class RejectionSampling:
    """Sample N completions per prompt, keep the best K, fine-tune on them."""

    model: str
    """Policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    rejection_sampling: rejection_sampling.Config = field(default_factory=rejection_sampling.Config)


def train(command: RejectionSampling, start: Start = NEW, *, monitors: Sequence[Monitor] = ()) -> None:
    """Load, run all rounds, save, compare with the reference, and sum up."""
    run, config = command.run, command.rejection_sampling
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = rejection_sampling.State.create(loaded.model, config, prompts=len(task.prompts), seed=run.seed)
    recorder = open_run(
        command,
        start,
        loaded,
        title="rejection-sampling",
        state=RunState(state, tuple(monitors)),
        total=config.rounds,
        rollouts_every=command.task.rollouts_every,
    )
    with recorder.session(stop_after=run.stop_after_seconds):
        run_rounds(state, task, config=config, recorder=recorder)
        save_policy(loaded, recorder)
        evaluation = held_out_comparison(loaded, task, state.reference, config.sampling, run.seed)
        finish(recorder, {"rounds": state.round, "last": recorder.row, "evaluation": evaluation}, quiet=run.quiet)


def run_rounds(
    state: rejection_sampling.State, task: Task, *, config: rejection_sampling.Config, recorder: Recorder
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

    while state.round < config.rounds:
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
            )
        recorder.append("selected.jsonl", [as_row(number, one) for one in result.selected])
        recorder.record(number, StepResult(metrics=result.metrics, groups=result.groups), last=True)
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
