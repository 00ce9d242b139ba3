"""The loops around the algorithms: data in, steps, and every step's metrics, rollouts and checkpoints on disk."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.phases import PhaseClock
from tether.errors import GuardError, MemoryShortError, RewardError, TetherError
from tether.interruption import Interrupted, heeded
from tether.runtime.changes import refuse_changes, refuse_other_inputs
from tether.runtime.checkpoint import Checkpoints, Place, summed
from tether.runtime.device import forget_peak, peak_gib
from tether.runtime.directory import RunDirectory
from tether.runtime.journal import Journal
from tether.runtime.progress import ProgressLine
from tether.runtime.state import restore
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
    checkpoints: Checkpoints
    journal: Journal
    progress: ProgressLine
    device: torch.device
    matrix_rate: float
    """FLOP/s of the device, by which its use is judged."""
    save_every: int = 0
    rollouts_every: int = 0
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those of the run that is resumed."""
    recorded: int = 0
    """The last step that has its row."""
    row: Metrics = field(default_factory=dict)
    """That row."""
    seconds_before: float = 0.0
    """What the run took before it was interrupted."""
    started: float = field(default_factory=time.monotonic)
    """When this session began, the time for loading included."""
    clock: float = 0.0

    def start(self) -> None:
        """A step begins now."""
        forget_peak(self.device)
        self.clock = time.perf_counter()
        self.journal.begin(self.recorded + 1)

    @property
    def seconds(self) -> float:
        """What the run has taken so far, over all its sessions."""
        return self.seconds_before + time.monotonic() - self.started

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
        self.row = {
            "step": float(step),
            **metrics,
            "step_time": seconds,
            **throughput(metrics, seconds, matrix_rate=self.matrix_rate),
            "memory/peak_gib": peak_gib(self.device),
        }
        self.directory.log(self.row)
        self.recorded = step
        if groups and self.rollouts_every and step % self.rollouts_every == 0:
            self.directory.rollouts(step, groups)
        if last or (self.save_every and step % self.save_every == 0):
            self.save(state)
        self.progress.advance(self.row)
        self.start()

    def save(self, state: Any, *, within_step: bool = False) -> None:
        """Begin to write a checkpoint: after the last recorded step, or ``within_step`` of the next one."""
        self.tidy()
        self.directory.make()
        if within_step:
            self.journal.write()
        needs = self.journal.files(after=self.recorded) if within_step else []
        place = Place(
            step=self.recorded,
            sizes=self.directory.sizes(),
            config=dict(self.directory.config),
            seconds=self.seconds,
            metrics=self.row,
            needs={str(file.relative_to(self.directory.path)): summed(file) for file in needs},
        )
        self.checkpoints.save(state, place, within_step=within_step)

    def tidy(self) -> None:
        """Wait for the checkpoint that is being written, and forget what it covers."""
        self.checkpoints.wait()
        self.journal.forget(up_to=self.checkpoints.oldest_step())

    def pick_up(self, state: Any) -> None:
        """Make ``state`` and the directory what they were at the newest checkpoint that is whole, or at the start."""
        checkpoint, wrong = self.checkpoints.newest()
        where = f"step {checkpoint.place.step}" if checkpoint else "the start"
        for line in wrong:
            print(f"{line}; it is passed over", file=sys.stderr)
        if checkpoint:
            refuse_changes(checkpoint.place.config, self.directory.config, allowed=self.allowed)
            restore(state, checkpoint.path)
            place = checkpoint.place
            self.recorded, self.row, self.seconds_before = place.step, place.metrics, place.seconds
        refuse_other_inputs(self.directory.begun_with(), self.directory.fingerprints, allowed=self.allowed)
        if self.allowed:
            self.directory.describe()
            if checkpoint:
                self.checkpoints.accept(checkpoint, self.directory.config)
        self.directory.cut_back(checkpoint.place.sizes if checkpoint else {}, step=self.recorded)
        self.checkpoints.forget_after(checkpoint)
        self.progress.start_from(self.recorded)
        print(f"{self.directory.path}: going on from {where}", file=sys.stderr)

    @contextlib.contextmanager
    def session(self, state: Any, *, stop_after: float | None) -> Iterator[None]:
        """The time in which the run is at work: the directory is its own, and requests to stop are heeded.

        Whatever ends it leaves a run that can go on. A request to stop, a reward that failed and memory that is short
        leave the state whole, so it is saved; after anything else the last checkpoint stands.
        """
        left = None if stop_after is None else max(0.0, self.started + stop_after - time.monotonic())
        with self.directory, heeded(left):
            if self.directory.made:
                self.pick_up(state)
            with self.signposted(), contextlib.closing(self.checkpoints):
                try:
                    with self.progress:
                        yield
                    self.tidy()
                except Interrupted as stop:
                    self.save_now(state)
                    over = self.recorded >= self.progress.total
                    where = "after its last step" if over else f"in step {self.recorded + 1}"
                    raise Interrupted(f"stopped by {stop} {where}; {self.way_on}") from stop
                except (RewardError, MemoryShortError):
                    if self.directory.made:
                        self.save_now(state)
                    raise

    @contextlib.contextmanager
    def signposted(self) -> Iterator[None]:
        """Errors say how to go on, once there is a run to go on with."""
        try:
            yield
        except TetherError as error:
            if not self.directory.made:
                raise
            raise type(error)(f"{error}; {self.way_on}") from error

    def save_now(self, state: Any) -> None:
        """Save a step as far as it has come, and wait until it is on the disk."""
        self.save(state, within_step=True)
        self.checkpoints.wait()

    @property
    def way_on(self) -> str:
        return f"go on with 'tether resume {self.directory.path}'"


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
) -> None:
    """All steps of supervised fine-tuning that are left; held-out loss at the end of each epoch."""
    size = min(config.batch_size, len(data))
    per_epoch = max(1, len(data) // size)
    recorder.start()
    while state.step < state.total_steps or state.row:
        if not state.row:
            with state.cursor.undone_unless_done():
                state.row = sft.step(state, state.cursor.take(data, size), config=config)
        metrics = dict(state.row)
        if held_out and (state.step % per_epoch == 0 or state.step == state.total_steps):
            clock = PhaseClock(state.policy.device)
            with clock.phase("eval"):
                metrics |= state.guard.fit(lambda budget: sft.evaluate(state.policy, held_out, token_budget=budget))
            metrics |= clock.metrics()
        state.row = {}
        recorder.record(state.step, metrics, state, last=state.step == state.total_steps)
    state.guard.require_sound_end("sft")


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
        recorder.record(state.step, metrics, state, last=state.over(config))

    return reward_model.train(state, pairs, held_out, config=config, on_step=on_step)


def run_rejection_sampling(
    state: rejection_sampling.State,
    prompts: Sequence[Prompt],
    *,
    generate: Generator,
    score: Scorer,
    config: rejection_sampling.Config,
    recorder: Recorder,
) -> None:
    """All rounds that are left. A round is a row; its fine-tuning steps are in ``sft.jsonl``, what it imitated in
    ``selected.jsonl``. Checkpoints fall due by fine-tuning steps, of which a round may have many.
    """
    recorder.start()

    def on_step(metrics: Metrics) -> None:
        recorder.directory.append("sft.jsonl", [{"round": float(state.round + 1), **metrics}])
        if recorder.save_every and state.tuning.step % recorder.save_every == 0:
            recorder.save(state, within_step=True)

    while state.round < config.rounds:
        number = state.round + 1
        with located(f"rejection-sampling round {number}"):
            result = rejection_sampling.step(
                state, prompts, generate=generate, score=score, config=config, on_step=on_step
            )
        recorder.directory.append("selected.jsonl", [as_row(number, one) for one in result.selected])
        recorder.record(number, result.metrics, state, groups=result.groups, last=True)
    state.tuning.guard.require_sound_end("rejection-sampling")


def as_row(number: int, one: rejection_sampling.Selected) -> dict[str, Any]:
    """A completion that round ``number`` imitated, as ``selected.jsonl`` has it: data for ``tether sft``."""
    prompt, completion = one.prompt, one.completion
    turn = [{"role": "assistant", "content": completion.text}]
    return {
        "round": number,
        "prompt": list(prompt.messages) if prompt.messages else prompt.text,
        "completion": turn if prompt.messages else completion.text,
        "score": one.score.total,
        "prompt_ids": list(prompt.ids),
        "completion_ids": list(completion.ids),
    }


def run_policy(
    state: ppo.State | grpo.State,
    step: Callable[[Sequence[Prompt]], StepResult],
    prompts: Sequence[Prompt],
    *,
    prompts_per_step: int,
    recorder: Recorder,
) -> None:
    """All steps of PPO or GRPO that are left; ``step`` is the algorithm's, waiting for its prompts."""
    recorder.start()
    while state.step < state.total_steps:
        with located(f"{recorder.progress.title} step {state.step + 1}"), state.cursor.undone_unless_done():
            result = step(state.cursor.take(prompts, prompts_per_step))
        recorder.record(state.step, result.metrics, state, groups=result.groups, last=state.step == state.total_steps)
    state.guard.require_sound_end(recorder.progress.title)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of a reward or of the generator say in which step they came up."""
    try:
        yield
    except (RewardError, GuardError) as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error
