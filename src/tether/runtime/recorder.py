"""Writes what a training loop produces: metrics, alarms, rollouts and checkpoints, and finds them again on resuming."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tether.errors import GuardError, MemoryShortError, RewardError, RunError, TetherError
from tether.names import metric_and_sign
from tether.observers import Alarm, Hook, StepRecord, Stop, Tracker
from tether.rewards.logged import set_progress
from tether.runtime.changes import HOW_LONG, changes, refuse_changes, refuse_other_inputs
from tether.runtime.checkpoint import Checkpoints, RunPosition, remove_checkpoints, summed
from tether.runtime.costs import costed
from tether.runtime.device import forget_peak, peak_gib
from tether.runtime.directory import ALARMS, SUMMARY, RunDirectory, begun_with
from tether.runtime.journal import Journal
from tether.runtime.metric_names import require_metric
from tether.runtime.progress import ProgressLine
from tether.runtime.state import RunState, load_weights, restore
from tether.stop_requests import Interrupted, asked, heeded
from tether.types import Metrics, StepResult
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


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best step of a run by a metric."""

    metric: str
    step: int
    value: float


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
    model: nn.Module
    """The model that is trained, for the hooks."""
    device: torch.device
    matrix_rate: float
    """FLOP/s of the device, by which its use is judged."""
    save_every: int = 0
    keep_checkpoints: bool = False
    """Whether those of the run are kept once it is finished."""
    rollouts_every: int = 0
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those of the run that is resumed."""
    sometimes: frozenset[str] = frozenset()
    """Metrics that some rows have only."""
    world: World = ALONE
    hooks: Sequence[Hook] = ()
    """Called by rank 0 with each step when its row is written; one that raises ends the run with its error."""
    trackers: Sequence[Tracker] = ()
    """Called by rank 0 with each step, before the hooks, and at the end."""
    recorded: int = 0
    """The last step that has its row."""
    ended: str = ""
    """Why the run ends before its last step: what a monitor or a hook said, and nothing trains after it."""
    best: Best | None = None
    """The step whose weights the model has at the end, where ``keep_best`` asks for the best."""
    row: Metrics = field(default_factory=dict)
    """That row."""
    seconds_before: float = 0.0
    """What the run took before it was interrupted."""
    started: float = field(default_factory=time.monotonic)
    """When this session began, including the time for loading."""
    clock: float = 0.0
    expected_gib: float | None = None
    """Peak memory that the run was estimated to take."""
    peak_before: float = 0.0
    """The peak of the process before the run took its first step, on a CPU,"""
    peak_gib: float = 0.0
    """and the highest of all steps in this session."""

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
        set_progress(self.recorded, self.progress.total)
        self.clock = time.perf_counter()
        self.journal.begin(self.recorded + 1)

    def record(self, step: int, result: StepResult, *, last: bool = False) -> None:
        """Record step ``step`` (from 1), and begin the next one; after the ``last`` one a checkpoint is due.

        Raises :class:`GuardError` before anything is written where a metric is not finite, and after a checkpoint where
        an alarm stops the run; :class:`Interrupted` where a rank was asked to.
        """
        where = f"{self.progress.title} step {step}"
        for name, value in result.metrics.items():
            if not math.isfinite(value):
                raise GuardError(f"{name} is not finite ({value})", where=where)
        # monitors see the completions of all ranks, so that they are in the same state everywhere
        result = replace(
            result,
            groups=tuple(group for part in self.world.gather(result.groups) for group in part),
            figures=tuple(group for part in self.world.gather(result.figures) for group in part),
        )
        said = [one for monitor in self.state.monitors for one in monitor.watch(step, result)]
        alarms = [one for one in said if isinstance(one, Alarm)]
        seconds = time.perf_counter() - self.clock
        row = costed(step, result.metrics, seconds, matrix_rate=self.matrix_rate, device=self.device, world=self.world)
        require_metric(self.checkpoints.kept.best, row.keys() | self.sometimes)
        self.row, self.recorded = row, step
        self.peak_gib = max(self.peak_gib, row["memory/peak_gib"])
        if self.writes:
            self._write(step, result, alarms)
        stops = [one for one in said if isinstance(one, Stop)] + self._hooked(step, result, alarms)
        self.ended = "; ".join(stop.reason for stop in stops)
        alarmed = any(alarm.stop for alarm in alarms)
        if last or alarmed or self.ended or self._due(step):
            self.save()
        if self.writes:
            self.progress.advance(self.row)
        if alarmed:
            raise GuardError("; ".join(alarm.in_full for alarm in alarms if alarm.stop), where=where)
        self.start()
        if self.world.any(bool(asked())) and not self.over:
            raise Interrupted(asked() or "a request to another rank")

    def _due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``: every so often, and where an evaluation is the best so far."""
        if self.save_every and step % self.save_every == 0:
            return True
        best = self.checkpoints.kept.best
        evaluated = best is not None and metric_and_sign(best)[0].startswith("eval/")
        return evaluated and self.checkpoints.would_be_best(self.row)

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the run's other growing files."""
        if self.writes:
            self.directory.append(name, rows)

    def _hooked(self, step: int, result: StepResult, alarms: Sequence[Alarm]) -> list[Stop]:
        """What the hooks of rank 0 ask for, on every rank; its trackers are told of the step."""
        stops: list[Stop] = []
        if self.writes and (self.hooks or self.trackers):
            record = StepRecord(
                command=self.progress.title,
                step=step,
                total=self.progress.total,
                metrics=dict(self.row),
                groups=result.groups,
                alarms=tuple(alarms),
                model=self.model,
            )
            for tracker in self.trackers:
                tracker.log(record)
            stops = [stop for hook in self.hooks if (stop := hook(record)) is not None]
        return [stop for part in self.world.gather(stops) for stop in part]

    def _write(self, step: int, result: StepResult, alarms: list[Alarm]) -> None:
        self.directory.log(self.row)
        if alarms:
            self.directory.append(ALARMS, [{"step": step, **asdict(alarm)} for alarm in alarms])
        for alarm in alarms:
            line = f"{self.progress.title} step {step}: {alarm.monitor}: {alarm.in_full}"
            print(one_line(line), file=sys.stderr, flush=True)
        if result.groups and self.rollouts_every and step % self.rollouts_every == 0:
            self.directory.rollouts(step, result.groups, result.figures)

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
            ended=self.ended,
            needs={str(file.relative_to(self.directory.path)): summed(file) for file in needs},
        )
        self.checkpoints.save(self.state, position, within_step=within_step)

    @property
    def own_journal(self) -> Journal | None:
        """The journal; None among several ranks, as it is one process's."""
        return self.journal if self.world.size == 1 else None

    @property
    def over(self) -> bool:
        """Whether the last step is recorded."""
        return bool(self.ended) or self.recorded >= self.progress.total

    def save_unfinished(self) -> None:
        """Save a step as far as it has come, and wait until it is on the disk. After the last step there is nothing to
        add to its checkpoint, and the model may be that of another step (:meth:`take_best`)."""
        if not self.over:
            self.save(within_step=True)
        self.checkpoints.wait()

    def tidy(self) -> None:
        """Wait for the checkpoint that is being written, and remove journal entries that it makes obsolete."""
        self.checkpoints.wait()
        if self.writes:
            self.journal.forget(up_to=self.checkpoints.oldest_step())

    def take_best(self) -> int:
        """Give the model the weights of the best step, where ``keep_best`` asks for that; gives the number of the step
        whose weights it then has.

        Nothing is saved from then on, so that a run which is interrupted here resumes from its last step.
        """
        self.checkpoints.wait()
        if self.checkpoints.kept.best is None:
            return self.recorded
        found, wrong = self.checkpoints.best()
        step, (name, _) = self.recorded, metric_and_sign(self.checkpoints.kept.best)
        if found is None:
            wrong.append(f"no checkpoint has the metric {name}; model/ is that of the last step")
        if self.writes:
            for line in wrong:
                print(line, file=sys.stderr)
        if found is None:
            return step
        load_weights(self.model, found.path)
        step = found.position.step
        self.best = Best(metric=name, step=step, value=found.position.metrics[name])
        return step

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete: write ``summary.json``, and remove what only a resumed run would need."""
        seconds = round(self.seconds, 3)
        self.tidy()
        if not self.writes:
            return
        self.checkpoints.finish()
        self.journal.remove()
        best = {"step": self.best.step, "value": self.best.value, "path": "model"} if self.best else None
        alarms = [
            {"step": row["step"], "monitor": row["monitor"], "message": row["message"]}
            for row in self.directory.alarms()
        ]
        written = {**summary, "best": best, "ended": self.ended or None, "alarms": alarms, "seconds": seconds}
        self.directory.summary(written)
        for tracker in self.trackers:
            tracker.finish(written, step=self.recorded)
        if not self.keep_checkpoints:  # after the summary: without either, all would be lost
            remove_checkpoints(self.directory.path)

    def restore_run(self) -> None:
        """Make the state and the directory what they were at the newest valid checkpoint, or at the start."""
        checkpoint, wrong = self.checkpoints.newest()
        where = f"step {checkpoint.position.step}" if checkpoint else "the start"
        if self.writes:
            for line in wrong:
                print(f"{line}; it is passed over", file=sys.stderr)
        if checkpoint is None and (self.directory.path / SUMMARY).is_file():
            raise RunError(
                "the run is finished and its checkpoints were removed, so it cannot be made longer",
                where=self.directory.given,
                hint="begin a new run, with --keep-checkpoints if it may become longer",
            )
        if checkpoint:
            position = checkpoint.position
            refuse_changes(position.config, self.directory.config, allowed=self.allowed)
            restore(self.state, checkpoint.path)
            self.recorded, self.row, self.seconds_before = position.step, position.metrics, position.seconds
            longer = HOW_LONG.intersection(changes(position.config, self.directory.config))
            self.ended = "" if longer else position.ended
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
            with self._advising(), self._tracked(), contextlib.closing(self.checkpoints):
                try:
                    with self.progress if self.writes else contextlib.nullcontext():
                        self.start()
                        self.peak_before = peak_gib(self.device)
                        yield
                    self.tidy()
                except Interrupted as stop:
                    self.save_unfinished()
                    when = "after its last step" if self.over else f"in step {self.recorded + 1}"
                    raise Interrupted(f"stopped by {stop} {when}; {self.way_on}") from stop
                except (RewardError, MemoryShortError):
                    if self.directory.made:
                        self.save_unfinished()
                    raise
                except KeyboardInterrupt as stop:  # raised by a reward or a hook; a signal is a request to stop
                    if not self.directory.made:
                        raise
                    when = f"in step {self.recorded + 1}"
                    raise Interrupted(
                        f"interrupted {when}; resume from its last checkpoint with {self.resume_command}"
                    ) from stop

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        """Trackers are closed once everything else of the run is in its files."""
        try:
            yield
        finally:
            if self.writes:
                for tracker in self.trackers:
                    tracker.close()

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
        return f"resume with {self.resume_command}"

    @property
    def resume_command(self) -> str:
        return f"'tether resume {self.directory.given}'"
