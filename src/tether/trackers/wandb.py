"""Weights & Biases: files in ``wandb/`` of the run directory, sent or kept as the user's settings of W&B say."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.trackers.rows import PROJECT, Ending, Row, TrackedRun

NOT_LOGGED_IN = "not logged in: run 'wandb login', or set WANDB_MODE=offline"


class WandB:
    """History per step, samples as tables, alarms as alerts, the report as a page."""

    rewinds = False
    where = ""
    run: Any
    module: Any

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        import wandb

        self.module = wandb
        chosen = wandb.setup().settings
        if chosen.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(NOT_LOGGED_IN)  # init would ask on the terminal, and wait
        identity = run.identity.get("id") or chosen.run_id or uuid.uuid4().hex[:8]
        self.run = wandb.init(
            project=chosen.project or PROJECT,
            name=chosen.run_name or run.name,
            id=identity,
            resume="allow" if run.identity else None,
            dir=str(run.directory),
            config=dict(run.config),
            # the terminal is the progress display's, and what is printed there may be anything
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )
        files = Path(self.run.dir).parent
        self.where = f"offline; 'wandb sync {files}' uploads it" if self.run.offline else str(self.run.url or "")
        return {"id": str(self.run.id)}

    def log(self, row: Row) -> None:
        self.run.log(row.with_table(self.module.Table), step=row.step)
        for monitor, message in row.alarms:
            self.run.alert(title=monitor, text=f"step {row.step}: {message}", level="WARN")

    def finish(self, ending: Ending) -> None:
        if ending.report:
            page = ending.report.read_text(encoding="utf-8")
            self.run.log({"report": self.module.Html(page, inject=False)}, step=ending.step)
        self.run.summary.update(ending.figures)

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
