"""A run directory: the only place a run writes to.

config.yaml  metrics.jsonl  rollouts/step_000010.parquet  checkpoints/step_000010/  model/  summary.json  report.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tether.errors import RunError
from tether.runtime.files import remove, require_writable, whole
from tether.types import Metrics, ScoredGroup

CONFIG = "config.yaml"


def refuse_if_taken(path: Path, *, overwrite: bool) -> None:
    """Raise unless ``path`` is free: one that can be made, an empty directory, or a run that may be replaced."""
    require_writable(path)
    if path.is_file():
        raise RunError(f"{path}: is a file; --out must name a directory")
    if path.exists() and any(path.iterdir()):
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: is not empty and not a run, so it is left alone; choose another --out")
        if not overwrite:
            raise RunError(f"{path}: already holds a run; choose another --out, or replace it with --overwrite")


class RunDirectory:
    """A place for a run, made when there is first something to write.

    A run that fails before its first row, at a reward function that raises say, so leaves nothing behind, and the run
    that it was to replace is still there.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> None:
        refuse_if_taken(path, overwrite=overwrite)
        self.path, self.config, self.overwrite = path, config, overwrite
        self.made = False

    def make(self) -> None:
        """Create the directory in place of what may be replaced, with ``config.yaml``; once."""
        if self.made:
            return
        refuse_if_taken(self.path, overwrite=self.overwrite)
        try:
            remove(self.path)
            self.path.mkdir(parents=True)
            (self.path / CONFIG).write_text(yaml.safe_dump(dict(self.config), sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written to ({error.strerror})") from error
        self.made = True

    def log(self, metrics: Metrics) -> None:
        """Append one row to ``metrics.jsonl``."""
        self.make()
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(metrics, allow_nan=False) + "\n")

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """One row a completion: prompt, completion, ids, log-probs, finish reason, score and its parts."""
        import pyarrow
        import pyarrow.parquet

        self.make()
        rows = [
            {
                "step": step,
                "prompt": group.rollouts.prompt.text,
                "completion": completion.text,
                "completion_ids": list(completion.ids),
                "logprobs": list(completion.logprobs),
                "finish": completion.finish.value,
                "weights_version": group.rollouts.weights_version,
                "score": score.total,
                **{f"reward/{name}": value for name, value in score.parts.items()},
            }
            for group in groups
            for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
        ]
        target = self.path / "rollouts" / f"step_{step:06d}.parquet"
        target.parent.mkdir(exist_ok=True)
        with whole(target) as partial:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A jsonl file beside the metrics, replaced whole."""
        self.make()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with whole(self.path / name) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """``summary.json``, replaced whole."""
        self.make()
        with whole(self.path / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=2), encoding="utf-8")


def read_metrics(path: Path) -> list[Metrics]:
    """The rows of a run's ``metrics.jsonl``."""
    if not (path / CONFIG).is_file():
        raise RunError(f"{path}: not a run directory: {CONFIG} is missing")
    file = path / "metrics.jsonl"
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunError(f"{file}:{number}: not valid JSON ({error.msg}); was the run killed here?") from None
    return rows
