"""Writes what a training loop produces: metrics, alarms, rollouts and checkpoints, and finds them again on resuming."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tether.errors import ConfigError, GuardError, MemoryShortError, RewardError, TetherError
from tether.figures import Max, Sum, reduce
from tether.runtime.changes import refuse_changes, refuse_other_inputs
from tether.runtime.checkpoint import Checkpoints, RunPosition, summed
from tether.runtime.device import forget_peak, peak_gib
from tether.runtime.directory import ALARMS, RunDirectory, begun_with
from tether.runtime.journal import Journal
from tether.runtime.progress import ProgressLine
from tether.runtime.state import RunState, restore
from tether.stop_requests import Interrupted, asked, heeded
from tether.types import Alarm, Metrics, ScoredGroup, StepResult
from tether.untrusted import one_line
from tether.world import ALONE, World

TIMINGS = (
    "time/",
    "step_time",
    "tokens_per_second",
    "mfu",
    "memory/",
    "sampling/prefill_tokens_per_second",
    "sampling/decode_tokens_per_second",
)
"""How the names of the metrics begin that vary from run to run; all others are the same when a run is repeated."""


@dataclass(kw_only=True)
class Recorder:
    """One row of metrics and one progress line per step, and alarms, rollouts and checkpoints when due.

    Every rank of a ``world`` has a recorder, and calls it alike; rank 0 writes.
    """

    directory: RunDirectory
    checkpoints: Checkpoints
    journal: Journal
    progress: ProgressLine
    state: RunState
    device: torch.device
    matrix_rate: float
    """FLOP/s of the device, by which its use is judged."""
    save_every: int = 0
    rollouts_every: int = 0
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those of the run that is resumed."""
    sometimes: frozenset[str] = frozenset()
    """Metrics that some rows have only."""
    world: World = ALONE
    recorded: int = 0
    """The last step that has its row."""
    row: Metrics = field(default_factory=dict)
    """That row."""
    seconds_before: float = 0.0
    """What the run took before it was interrupted."""
    started: float = field(default_factory=time.monotonic)
    """When this session began, including the time for loading."""
    clock: float = 0.0

    @property
    def writes(self) -> bool:
        return self.world.rank == 0

    @property
    def seconds(self) -> float:
        """What the run has taken so far, over all its sessions."""
        return self.seconds_before + time.monotonic() - self.started

    def start(self) -> None:
        """A step begins now."""
        forget_peak(self.device)
        self.clock = time.perf_counter()
        self.journal.begin(self.recorded + 1)

    def record(self, step: int, result: StepResult, *, last: bool = False) -> None:
        """Record step ``step`` (from 1), and begin the next one; after the ``last`` one a checkpoint is due.

        Raises :class:`GuardError` before anything is written where a metric is not finite, and after a checkpoint where
        a monitor asks to stop; :class:`Interrupted` where a rank was asked to.
        """
        where = f"{self.progress.title} step {step}"
        for name, value in result.metrics.items():
            if not math.isfinite(value):
                raise GuardError(f"{name} is not finite ({value})", where=where)
        # monitors see the completions of all ranks, so that they are in the same state everywhere
        result = replace(result, groups=tuple(group for part in self.world.gather(result.groups) for group in part))
        alarms = [alarm for monitor in self.state.monitors for alarm in monitor.watch(step, result)]
        row = self._row(step, result.metrics)
        require_metric(self.checkpoints.kept.best, row.keys() | self.sometimes)
        self.row, self.recorded = row, step
        due = self.rollouts_every and step % self.rollouts_every == 0
        if self.writes:
            self._write(step, result.groups if due else (), alarms)
        stop = any(alarm.stop for alarm in alarms)
        if last or stop or (self.save_every and step % self.save_every == 0):
            self.save()
        if self.writes:
            self.progress.advance(self.row)
        if stop:
            raise GuardError("; ".join(alarm.message for alarm in alarms if alarm.stop), where=where)
        self.start()
        if self.world.any(bool(asked())) and step < self.progress.total:
            raise Interrupted(asked() or "a request to another rank")

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the run's other growing files."""
        if self.writes:
            self.directory.append(name, rows)

    def _row(self, step: int, metrics: Metrics) -> Metrics:
        """The row of a step: its metrics, and what it cost on all ranks together."""
        cost = reduce(
            {
                "seconds": Max(time.perf_counter() - self.clock),
                "rate": Sum(self.matrix_rate),
                "gib": Max(peak_gib(self.device)),
            },
            self.world,
        )
        return {
            "step": float(step),
            **metrics,
            "step_time": cost["seconds"],
            **throughput(metrics, cost["seconds"], matrix_rate=cost["rate"]),
            "memory/peak_gib": cost["gib"],
        }

    def _write(self, step: int, groups: Sequence[ScoredGroup], alarms: list[Alarm]) -> None:
        self.directory.log(self.row)
        if alarms:
            self.directory.append(ALARMS, [{"step": step, **asdict(alarm)} for alarm in alarms])
        for alarm in alarms:
            line = f"{self.progress.title} step {step}: {alarm.monitor}: {alarm.message}"
            print(one_line(line), file=sys.stderr, flush=True)
        if groups:
            self.directory.rollouts(step, groups)

    def save(self, *, within_step: bool = False) -> None:
        """Begin to write a checkpoint: after the last recorded step, or ``within_step`` of the next one."""
        if not self.writes:
            return
        self.tidy()
        self.directory.make()
        if within_step:
            self.journal.write()
        needs = self.journal.files(after=self.recorded) if within_step else []
        position = RunPosition(
            step=self.recorded,
            sizes=self.directory.sizes(),
            config=dict(self.directory.config),
            seconds=self.seconds,
            metrics=self.row,
            needs={str(file.relative_to(self.directory.path)): summed(file) for file in needs},
        )
        self.checkpoints.save(self.state, position, within_step=within_step)

    def save_now(self) -> None:
        """Save a step as far as it has come, and wait until it is on the disk."""
        self.save(within_step=True)
        self.checkpoints.wait()

    def tidy(self) -> None:
        """Wait for the checkpoint that is being written, and remove journal entries that it makes obsolete."""
        self.checkpoints.wait()
        if self.writes:
            self.journal.forget(up_to=self.checkpoints.oldest_step())

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete: remove what only a resumed run would need, and write ``summary.json``."""
        seconds = round(self.seconds, 3)
        self.tidy()
        if self.writes:
            self.checkpoints.finish()
            self.journal.remove()  # before the summary: a run that has one is never resumed
            self.directory.summary({**summary, "seconds": seconds})

    def restore_run(self) -> None:
        """Make the state and the directory what they were at the newest valid checkpoint, or at the start."""
        checkpoint, wrong = self.checkpoints.newest()
        where = f"step {checkpoint.position.step}" if checkpoint else "the start"
        if self.writes:
            for line in wrong:
                print(f"{line}; it is passed over", file=sys.stderr)
        if checkpoint:
            position = checkpoint.position
            refuse_changes(position.config, self.directory.config, allowed=self.allowed)
            restore(self.state, checkpoint.path)
            self.recorded, self.row, self.seconds_before = position.step, position.metrics, position.seconds
        refuse_other_inputs(
            begun_with(self.directory.path),
            self.directory.fingerprints,
            allowed=self.allowed,
            places=self.directory.config,
        )
        self.world.any(False)  # all ranks have read what rank 0 is about to change
        if not self.writes:
            return
        if self.allowed or not self.directory.is_described():  # an input may have moved
            self.directory.describe()
            if checkpoint:
                self.checkpoints.accept(checkpoint, self.directory.config)
        self.directory.cut_back(checkpoint.position.sizes if checkpoint else {}, step=self.recorded)
        self.checkpoints.forget_after(checkpoint)
        self.progress.start_from(self.recorded)
        print(f"{self.directory.given}: resuming from {where}", file=sys.stderr)

    @contextlib.contextmanager
    def session(self, *, stop_after: float | None) -> Iterator[None]:
        """The time in which the run trains: its directory is locked, and requests to stop take effect.

        However it ends, the run can be resumed. A request to stop, a reward that failed and a shortage of memory leave
        the state consistent, so it is saved; after anything else the last checkpoint stands.
        """
        left = None if stop_after is None else max(0.0, self.started + stop_after - time.monotonic())
        locked = self.directory if self.writes else contextlib.nullcontext()
        with locked, heeded(left, within_steps=self.world.size == 1):
            if self.directory.made:
                self.restore_run()
            with self._advising(), contextlib.closing(self.checkpoints):
                try:
                    with self.progress if self.writes else contextlib.nullcontext():
                        self.start()
                        yield
                    self.tidy()
                except Interrupted as stop:
                    self.save_now()
                    over = self.recorded >= self.progress.total
                    when = "after its last step" if over else f"in step {self.recorded + 1}"
                    raise Interrupted(f"stopped by {stop} {when}; {self.way_on}") from stop
                except (RewardError, MemoryShortError):
                    if self.directory.made:
                        self.save_now()
                    raise

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Errors say how to resume, once there is a run to resume."""
        try:
            yield
        except TetherError as error:
            if self.directory.made:
                error.advise(self.way_on)
            raise

    @property
    def way_on(self) -> str:
        return f"resume with 'tether resume {self.directory.given}'"


def require_metric(best: str | None, known: Set[str]) -> None:
    """Raise :class:`ConfigError` unless ``best``, the value of ``keep_best``, names one of the ``known`` metrics."""
    metric = (best or "").removeprefix("-")
    if best is None or metric in known:
        return
    close = difflib.get_close_matches(metric, sorted(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"the run has no metric {metric!r}",
        where="--keep-best",
        hint=f"{hint}metrics.jsonl and docs/metrics.md name them",
    )


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
