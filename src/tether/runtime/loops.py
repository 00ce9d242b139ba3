"""The loops around the algorithms: data in, steps, and every step's metrics, rollouts and checkpoints on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.runtime.checkpoint import save_checkpoint
from tether.runtime.directory import RunDirectory
from tether.runtime.progress import ProgressLine
from tether.types import Demonstration, Generator, Metrics, PreferencePair, Prompt, Scorer, StepResult


@dataclass
class Recorder:
    """Writes what a loop produces: a metrics row and a progress line a step, rollouts and checkpoints when due."""

    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    progress: ProgressLine
    save_every: int = 0
    rollouts_every: int = 0
    clock: float = 0.0

    def start(self) -> None:
        self.clock = time.monotonic()

    def row(self, step: int, metrics: Metrics) -> None:
        """Metrics of step ``step`` (from 1), with the seconds since the row before as ``step_time``."""
        now = time.monotonic()
        whole = {"step": float(step), **metrics, "step_time": now - self.clock}
        self.directory.log(whole)
        self.progress.advance(whole)
        self.clock = now

    def checkpoint(self, step: int, state: Any, *, last: bool = False) -> None:
        if last or (self.save_every and step % self.save_every == 0):
            save_checkpoint(self.directory.path, step, state, self.tokenizer)

    def rollouts(self, step: int, result: StepResult) -> None:
        if self.rollouts_every and step % self.rollouts_every == 0:
            self.directory.rollouts(step, result.groups)


def run_sft(
    state: sft.State,
    data: Sequence[Demonstration],
    held_out: Sequence[Demonstration],
    *,
    config: sft.Config,
    recorder: Recorder,
) -> Metrics:
    """All steps of supervised fine-tuning; held-out loss at the end of each epoch. Gives the last row."""
    size = min(config.batch_size, len(data))
    per_epoch = max(1, len(data) // size)
    recorder.start()
    metrics: Metrics = {}
    while state.step < state.total_steps:
        metrics = sft.step(state, state.cursor.take(data, size), config=config)
        if held_out and (state.step % per_epoch == 0 or state.step == state.total_steps):
            metrics |= sft.evaluate(state.policy, held_out, token_budget=config.micro_batch_tokens)
        recorder.row(state.step, metrics)
        recorder.checkpoint(state.step, state, last=state.step == state.total_steps)
    return metrics


def run_reward_model(
    state: reward_model.State,
    pairs: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    *,
    config: reward_model.Config,
    recorder: Recorder,
) -> reward_model.Evaluation:
    """Reward-model training to its end; the best weights are in the model afterwards."""
    recorder.start()

    def on_step(metrics: Metrics) -> None:
        recorder.row(state.step, metrics)
        recorder.checkpoint(state.step, state)

    evaluation = reward_model.train(state, pairs, held_out, config=config, on_step=on_step)
    recorder.checkpoint(state.step, state, last=True)
    return evaluation


def run_rejection_sampling(
    state: rejection_sampling.State,
    prompts: Sequence[Prompt],
    *,
    generate: Generator,
    score: Scorer,
    config: rejection_sampling.Config,
    recorder: Recorder,
) -> list[rejection_sampling.RoundResult]:
    """All rounds. A round is a row; its fine-tuning steps are in ``sft.jsonl``."""
    results = []
    recorder.start()
    fine_tuning: list[Metrics] = []
    while state.round < config.rounds:
        number = float(state.round + 1)

        def on_step(metrics: Metrics, number: float = number) -> None:
            fine_tuning.append({"round": number, **metrics})

        result = rejection_sampling.step(
            state,
            prompts,
            generate=generate,
            score=score,
            config=config,
            on_step=on_step,
        )
        results.append(result)
        recorder.row(state.round, result.metrics)
        recorder.rollouts(state.round, StepResult(metrics=result.metrics, groups=result.groups))
        recorder.directory.write_rows("sft.jsonl", fine_tuning)
        recorder.checkpoint(state.round, state, last=state.round == config.rounds)
    return results


def run_ppo(
    state: ppo.State,
    prompts: Sequence[Prompt],
    *,
    prompts_per_step: int,
    generate: Generator,
    score: Scorer,
    config: ppo.Config,
    recorder: Recorder,
) -> Metrics:
    """All steps of PPO. Gives the last row."""
    recorder.start()
    metrics: Metrics = {}
    while state.step < state.total_steps:
        result = ppo.step(
            state, state.cursor.take(prompts, prompts_per_step), generate=generate, score=score, config=config
        )
        metrics = _record(recorder, state, result)
    return metrics


def run_grpo(
    state: grpo.State,
    prompts: Sequence[Prompt],
    *,
    prompts_per_step: int,
    generate: Generator,
    score: Scorer,
    config: grpo.Config,
    recorder: Recorder,
) -> Metrics:
    """All steps of GRPO; refills take their prompts from the same cursor. Gives the last row."""
    recorder.start()
    metrics: Metrics = {}
    while state.step < state.total_steps:
        result = grpo.step(
            state,
            state.cursor.take(prompts, prompts_per_step),
            generate=generate,
            score=score,
            config=config,
            fresh=lambda n: state.cursor.take(prompts, n),
        )
        metrics = _record(recorder, state, result)
    return metrics


def _record(recorder: Recorder, state: ppo.State | grpo.State, result: StepResult) -> Metrics:
    recorder.row(state.step, result.metrics)
    recorder.rollouts(state.step, result)
    recorder.checkpoint(state.step, state, last=state.step == state.total_steps)
    return result.metrics
