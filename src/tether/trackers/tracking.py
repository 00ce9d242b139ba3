"""All trackers of a run, as its recorder knows them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tether.observers import StepRecord
from tether.report.run import write_report
from tether.trackers.identities import Identities
from tether.trackers.mlflow import MLflow
from tether.trackers.names import TrackerName
from tether.trackers.rows import Backend, Ending, TrackedRun, row_of, samples_every, without_secrets
from tether.trackers.supervised import Supervised
from tether.trackers.tensorboard import TensorBoard
from tether.trackers.trackio import Trackio
from tether.trackers.wandb import WandB
from tether.untrusted import one_line, shown

BACKENDS: Mapping[TrackerName, Callable[[], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Tracking:
    """Gives every recorded step to the trackers. It raises nothing of theirs.

    They begin with the first step that is recorded, when the run directory is there to remember them.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        *,
        directory: Path,
        config: Mapping[str, Any],
        total: int,
        rollouts_every: int,
        resumed: bool,
        quiet: bool,
    ) -> None:
        self.directory, self.config = directory, without_secrets(config)
        self.samples_every = samples_every(rollouts_every, total)
        identities = Identities(directory, resumed=resumed)
        self.trackers = [Supervised(name, BACKENDS[name](), identities, quiet=quiet) for name in dict.fromkeys(names)]

    def log(self, record: StepRecord) -> None:
        """Give a recorded step to all."""
        self._begin(first=record.step)
        due = self.samples_every and record.step % self.samples_every == 0
        row = row_of(record, samples=bool(due))
        for tracker in self.trackers:
            tracker.log(row)

    def finish(self, summary: Mapping[str, Any], *, step: int) -> None:
        """Give them the summary and the report of a run that is finished after ``step``."""
        self._begin(first=None)
        ending = Ending(step=step, summary=summary, report=self._report())
        for tracker in self.trackers:
            tracker.finish(ending)

    def close(self) -> None:
        """Wait until everything is sent, for a while."""
        for tracker in self.trackers:
            tracker.close()

    def _begin(self, *, first: int | None) -> None:
        run = TrackedRun(
            name=self.directory.name, directory=self.directory, config=self.config, identity={}, first=first
        )
        for tracker in self.trackers:
            if not tracker.started:
                tracker.start(run)

    def _report(self) -> Path | None:
        try:
            return write_report([self.directory])
        except Exception as error:  # the run is finished, and its report is only to be shown
            why = f"--track: no report ({shown(error, str)}); the run is complete without it"
            print(one_line(why), file=sys.stderr, flush=True)
            return None
