"""MLflow: the tracking server or store that MLFLOW_TRACKING_URI names, else MLflow's default."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tether.trackers.rows import PROJECT, Ending, Row, TrackedRun
from tether.types import Metrics
from tether.untrusted import shown

SAMPLES = "samples.json"
AT_ONCE = 100
"""Metrics, or parameters, of one request; MLflow takes at most 1000 and 100."""
_REFUSED = re.compile(r"[^\w.\-/ ]")


class MLflow:
    """Metrics per step, samples as tables, options as parameters, alarms as tags, the report as an artifact."""

    rewinds = False
    where = ""
    client: Any
    run_id: str

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # the terminal has one of its own
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if run.identity:
            self.run_id = run.identity["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(self._experiment(), run_name=run.name).info.run_id
            self._parameters(run.config)
        self.where = f"run {self.run_id} at {self.client.tracking_uri}"
        return {"run_id": self.run_id}

    def _experiment(self) -> str:
        """The id of the experiment that the user's settings name, made where there is none."""
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self.client.create_experiment(name))

    def _parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        found = [Param(allowed(name), shown(value, str)) for name, value in config.items()]
        for some in in_parts(found):
            self.client.log_batch(self.run_id, params=some)

    def _metrics(self, metrics: Metrics, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(allowed(name), value, now, step) for name, value in metrics.items()]
        for some in in_parts(found):
            self.client.log_batch(self.run_id, metrics=some)

    def log(self, row: Row) -> None:
        self._metrics(row.metrics, row.step)
        if row.samples:
            columns = {name: [sample[name] for sample in row.samples] for name in row.samples[0]}
            self.client.log_table(self.run_id, columns, SAMPLES)  # appends
        for monitor, message in row.alarms:
            self.client.set_tag(self.run_id, f"alarm.{allowed(monitor)}", f"step {row.step}: {message}")

    def finish(self, ending: Ending) -> None:
        self._metrics(ending.figures, ending.step)
        self.client.log_dict(self.run_id, dict(ending.summary), "summary.json")
        if ending.report:
            self.client.log_artifact(self.run_id, str(ending.report))

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def in_parts(values: Sequence[Any]) -> list[Sequence[Any]]:
    """``values`` in parts of :data:`AT_ONCE`."""
    return [values[i : i + AT_ONCE] for i in range(0, len(values), AT_ONCE)]


def allowed(name: str) -> str:
    """``name`` with a line for each character that MLflow refuses.

    >>> allowed("rewards/r.py:fn/mean")
    'rewards/r.py_fn/mean'
    """
    return _REFUSED.sub("_", name)
