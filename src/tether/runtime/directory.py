"""A run directory: the only place a run writes to.

config.yaml  fingerprints.json  data.json  metrics.jsonl  rollouts/step_000010.parquet  checkpoints/step_000010/
journal/  model/  summary.json  report.html
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tether.errors import RunError
from tether.runtime import lock
from tether.runtime.files import remove, require_writable, sync_one, whole, writing
from tether.types import Metrics, ScoredGroup

CONFIG = "config.yaml"
SUMMARY = "summary.json"
"""Written last: a run that has one is finished."""
FINGERPRINTS = "fingerprints.json"
ROWS = "metrics.jsonl"
GROWING = (ROWS, "sft.jsonl", "selected.jsonl")
"""The files that grow with the run. What they hold past a checkpoint is cut off when a run goes on from there."""


SKIPPED, DATA = "skipped.jsonl", "data.json"
BEFORE_CONFIG = (SKIPPED, DATA, FINGERPRINTS)
"""What a new run writes before the file that makes its directory a run's."""


def contents(path: Path) -> list[Path]:
    """What is in a directory, the lock aside; nothing where there is none."""
    return [inner for inner in path.iterdir() if inner.name != lock.NAME] if path.is_dir() else []


def left_by_a_kill(path: Path) -> bool:
    """Whether a file can only be what a run has left that was killed while it made its directory."""
    return path.name in BEFORE_CONFIG or path.name in {f".{name}.partial" for name in (*BEFORE_CONFIG, CONFIG)}


def refuse_if_taken(path: Path, *, overwrite: bool) -> None:
    """Raise unless ``path`` is free: one that can be made, an empty directory, or a run that may be replaced."""
    require_writable(path)
    if path.is_file():
        raise RunError(f"{path}: is a file; --out must name a directory")
    if found := contents(path):
        if not (path / CONFIG).is_file() and all(map(left_by_a_kill, found)):
            return
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: is not empty and not a run, so it is left alone; choose another --out")
        if not overwrite:
            raise RunError(
                f"{path}: already holds a run; go on with 'tether resume {path}', replace it with --overwrite, "
                "or choose another --out"
            )


class RunDirectory:
    """A place for a run, filled when there is first something to write.

    A run that fails before its first row, at a reward function that raises say, so leaves nothing behind, and the run
    that it was to replace is still there. As a context manager it is locked against other processes for that time.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        fingerprints: Mapping[str, str] | None = None,
        data: Sequence[Mapping[str, Any]] = (),
        skipped: Sequence[Mapping[str, Any]] = (),
        overwrite: bool = False,
        resumed: bool = False,
    ) -> None:
        """``fingerprints`` are of what the run reads, ``data`` what was found in it and ``skipped`` the rows left out;
        each has its file. A run that is ``resumed`` has its directory already."""
        if not resumed:
            refuse_if_taken(path, overwrite=overwrite)
        self.path, self.config, self.overwrite = path, config, overwrite
        self.fingerprints, self.data, self.skipped = dict(fingerprints or {}), data, skipped
        self.made = resumed
        self.lock: lock.Lock | None = None
        self.new: list[Path] = []
        """Directories made for the lock alone, innermost first."""

    def __enter__(self) -> RunDirectory:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.new = missing
            try:
                self.lock = lock.Lock(self.path)
            except RunError:
                self._forget()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.lock is not None
        self.lock.release()
        self.lock = None
        if not self.made:
            self._forget()

    def _forget(self) -> None:
        """Remove the directories that were made, as far as they are empty."""
        for path in self.new:
            if any(path.iterdir()):
                break
            path.rmdir()

    def make(self) -> None:
        """Fill the directory in place of what may be replaced, with ``config.yaml``; once."""
        if self.made:
            return
        refuse_if_taken(self.path, overwrite=self.overwrite)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for old in sorted(contents(self.path), key=lambda path: path.name == CONFIG):
                remove(old)  # config.yaml last: as long as it is there, the rest may be replaced
        self.made = True
        try:
            if self.skipped:
                self.write_rows(SKIPPED, self.skipped)
            if self.data:
                self.write_json(DATA, self.data)
            self.describe()
        except RunError:
            self.made = False
            with writing(self.path):
                for file in contents(self.path):  # without config.yaml it is no run, and would only be in the way
                    remove(file)
            raise

    def describe(self) -> None:
        """``fingerprints.json`` and ``config.yaml``, which makes the directory a run's."""
        self.write_json(FINGERPRINTS, self.fingerprints)
        with whole(self.path / CONFIG) as partial:
            partial.write_text(yaml.safe_dump(dict(self.config), sort_keys=False), encoding="utf-8")

    def begun_with(self) -> dict[str, str]:
        """The fingerprints of what the run was begun with."""
        file = self.path / FINGERPRINTS
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{file}: cannot be read, so the run cannot go on ({error})") from None
        return dict(found)

    def write_json(self, name: str, value: Any, *, durable: bool = False) -> None:
        """A JSON file, replaced whole."""
        with whole(self.path / name, durable=durable) as partial:
            partial.write_text(json.dumps(value, indent=2), encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append one row to ``metrics.jsonl``."""
        self.append(ROWS, [metrics])

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the files that grow: all of them, or none and an error."""
        assert name in GROWING, name
        self.make()
        file = self.path / name
        lines = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        with writing(file):
            before = file.stat().st_size if file.exists() else 0
            try:
                with file.open("a", encoding="utf-8") as out:
                    out.write(lines)
            except OSError:
                os.truncate(file, before)
                raise

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
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        with whole(target) as partial, partial.open("wb") as out:  # pyarrow takes some names for addresses
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A jsonl file beside the metrics, replaced whole."""
        self.make()
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with whole(self.path / name) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """``summary.json``, replaced whole: the run is finished."""
        self.make()
        self.write_json(SUMMARY, summary, durable=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that grow, once they are on the disk."""
        files = [self.path / name for name in GROWING if (self.path / name).is_file()]
        with writing(self.path):
            for file in files:
                sync_one(file)
        return {file.name: file.stat().st_size for file in files}

    def cut_back(self, sizes: Mapping[str, int], *, step: int) -> None:
        """Take back what was written past ``step``, when the files that grow had these ``sizes``."""
        for name in GROWING:
            file, size = self.path / name, sizes.get(name, 0)
            found = file.stat().st_size if file.is_file() else 0
            if found < size:
                raise RunError(f"{file}: has {found} bytes and had {size} at the checkpoint; rows of it were removed")
            with writing(file):
                if found and not size:
                    remove(file)
                elif found > size:
                    os.truncate(file, size)
        for file in (self.path / "rollouts").glob("step_*.parquet"):
            number = re.fullmatch(r"step_(\d+)\.parquet", file.name)
            if number and int(number[1]) > step:
                remove(file)
        for left in (self.path / "rollouts").glob(".*.partial"):
            remove(left)
        remove(self.path / SUMMARY)  # the run is at work again


def read_metrics(path: Path) -> list[Metrics]:
    """The rows of a run's ``metrics.jsonl``."""
    if not (path / CONFIG).is_file():
        raise RunError(f"{path}: not a run directory: {CONFIG} is missing")
    file = path / ROWS
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):  # of text there are more ends of lines
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or error
            raise RunError(f"{file}:{number}: not valid JSON ({reason}); was the run killed here?") from None
        if not isinstance(row, dict) or not all(isinstance(value, int | float) for value in row.values()):
            raise RunError(f"{file}:{number}: a row of metrics is one JSON object of numbers")
        rows.append(row)
    return rows
