"""The loops around the algorithms: data in, steps, and every step's metrics, rollouts and checkpoints on disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.phases import PhaseClock
from tether.errors import GuardError, RewardError
from tether.runtime.checkpoint import save_checkpoint
from tether.runtime.device import forget_peak, peak_gib
from tether.runtime.directory import RunDirectory
from tether.runtime.progress import ProgressLine
from tether.types import Demonstration, Generator, Metrics, PreferencePair, Prompt, ScoredGroup, Scorer, StepResult

TIMINGS = (
    "time/",
    "step_time",
    "tokens_per_second",
    "mfu",
    "memory/",
    "sampling/prefill_tokens_per_second",
    "sampling/decode_tokens_per_second",
)
"""How the names of the metrics begin that depend on the machine and its hour; a run repeated gives all others again."""


@dataclass
class Recorder:
    """Writes what a loop produces: a metrics row and a progress line a step, rollouts and checkpoints when due."""

    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    progress: ProgressLine
    device: torch.device
    matrix_rate: float
    """FLOP/s of the device, by which its use is judged."""
    save_every: int = 0
    rollouts_every: int = 0
    clock: float = 0.0

    def start(self) -> None:
        """A step begins now."""
        forget_peak(self.device)
        self.clock = time.perf_counter()

    def record(
        self, step: int, metrics: Metrics, state: Any, *, groups: Sequence[ScoredGroup] = (), last: bool = False
    ) -> None:
        """Step ``step`` (from 1) is over, and the next begins when it is on disk. Its seconds are ``step_time``.

        Raises :class:`GuardError`, before anything is written, where a metric is not finite.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise GuardError(f"{self.progress.title} step {step}: {name} is not finite ({value})")
        seconds = time.perf_counter() - self.clock
        row = {
            "step": float(step),
            **metrics,
            "step_time": seconds,
            **throughput(metrics, seconds, matrix_rate=self.matrix_rate),
            "memory/peak_gib": peak_gib(self.device),
        }
        self.directory.log(row)
        if groups and self.rollouts_every and step % self.rollouts_every == 0:
            self.directory.rollouts(step, groups)
        if last or (self.save_every and step % self.save_every == 0):
            self.checkpoint(step, state)
        self.progress.advance(row)
        self.start()

    def checkpoint(self, step: int, state: Any) -> None:
        save_checkpoint(self.directory.path, step, state, self.tokenizer)


def throughput(metrics: Metrics, step_time: float, *, matrix_rate: float) -> Metrics:
    """``tokens_per_second``; ``mfu`` of the update, ``mfu/step`` of all phases together.

    mfu = flops/update / (time/update * matrix_rate), mfu/step = sum of flops/PHASE / (step_time * matrix_rate)
    """
    flops = sum(value for name, value in metrics.items() if name.startswith("flops/"))
    return {
        "tokens_per_second": metrics["num_tokens"] / step_time,
        "mfu": metrics["flops/update"] / (metrics["time/update"] * matrix_rate),
        "mfu/step": flops / (step_time * matrix_rate),
    }


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
            clock = PhaseClock(state.policy.device)
            with clock.phase("eval"):
                metrics |= sft.evaluate(state.policy, held_out, token_budget=config.micro_batch_tokens)
            metrics |= clock.metrics()
        recorder.record(state.step, metrics, state, last=state.step == state.total_steps)
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
        recorder.record(state.step, metrics, state)

    evaluation = reward_model.train(state, pairs, held_out, config=config, on_step=on_step)
    recorder.checkpoint(state.step, state)
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

        with located(f"rejection-sampling round {state.round + 1}"):
            result = rejection_sampling.step(
                state, prompts, generate=generate, score=score, config=config, on_step=on_step
            )
        results.append(result)
        recorder.record(state.round, result.metrics, state, groups=result.groups, last=state.round == config.rounds)
        recorder.directory.write_rows("sft.jsonl", fine_tuning)
    return results


def run_policy(
    state: ppo.State | grpo.State,
    step: Callable[[Sequence[Prompt]], StepResult],
    prompts: Sequence[Prompt],
    *,
    prompts_per_step: int,
    recorder: Recorder,
) -> Metrics:
    """All steps of PPO or GRPO; ``step`` is the algorithm's, waiting for its prompts. Gives the last row."""
    recorder.start()
    metrics: Metrics = {}
    while state.step < state.total_steps:
        with located(f"{recorder.progress.title} step {state.step + 1}"):
            result = step(state.cursor.take(prompts, prompts_per_step))
        metrics = result.metrics
        recorder.record(state.step, metrics, state, groups=result.groups, last=state.step == state.total_steps)
    return metrics


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of a reward or of the generator say in which step they came up."""
    try:
        yield
    except (RewardError, GuardError) as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error
