"""Trackio: a database on this machine, or the server or Space that the user's settings of Trackio name."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tether.trackers.rows import PROJECT, Ending, Row, TrackedRun


class Trackio:
    """Metrics per step, samples as tables, alarms as alerts, the report as an artifact."""

    rewinds = False
    where = ""
    run: Any
    module: Any

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        import trackio

        self.module = trackio
        # a run is resumed by its name, which other runs of the project must not have
        name = run.identity.get("name") or f"{run.name}-{uuid.uuid4().hex[:6]}"
        self.run = trackio.init(
            project=PROJECT,
            name=name,
            config=dict(run.config),
            resume="allow" if run.identity else "never",
            embed=False,
        )
        return {"name": name}

    def log(self, row: Row) -> None:
        self.run.log(row.with_table(self.module.Table), step=row.step)
        for monitor, message in row.alarms:
            self.run.alert(title=monitor, text=message, step=row.step)

    def finish(self, ending: Ending) -> None:
        if ending.figures:
            self.run.log(dict(ending.figures), step=ending.step)
        if ending.report:
            self.run.log_artifact(str(ending.report), name=f"report-{self.run.name}", type="report")

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - Trackio's runs have no status
        self.run.finish()
