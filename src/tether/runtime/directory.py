"""A run directory: the only place a run writes to.

config.yaml  fingerprints.json  data.json  metrics.jsonl  alarms.jsonl  rollouts/step_000010.parquet
checkpoints/step_000010/  journal/  evaluation.parquet  test_pairs.parquet  trackers.json  model/  summary.json
report.html
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tether.errors import RunError
from tether.runtime import lock
from tether.runtime.files import atomic_write, remove, require_writable, sync_one, write_table, writing
from tether.runtime.json_text import to_json
from tether.types import Completion, CompletionFigures, Metrics, ScoredGroup
from tether.untrusted import read_flat_yaml

FORMAT = 3
"""Version of what a run directory holds, the first line of its ``config.yaml``. A run of another version cannot be
resumed; version 1 has no such line."""
CONFIG = "config.yaml"
SUMMARY = "summary.json"
"""Written last: a run that has one is finished."""
FINGERPRINTS = "fingerprints.json"
ROWS, ALARMS = "metrics.jsonl", "alarms.jsonl"
GROWING = (ROWS, ALARMS, "sft.jsonl", "selected.jsonl")
"""The files that grow with the run. Whatever they hold past a checkpoint is removed when the run resumes from it."""
SKIPPED, DATA = "skipped.jsonl", "data.json"
BEFORE_CONFIG = (SKIPPED, DATA, FINGERPRINTS)
"""What a new run writes before ``config.yaml``, which makes its directory a run directory."""


def contents(path: Path) -> list[Path]:
    """What a directory holds, without the lock; nothing where there is no directory."""
    return [inner for inner in path.iterdir() if inner.name != lock.NAME] if path.is_dir() else []


def left_by_a_kill(path: Path) -> bool:
    """Whether a file can only come from a run that was killed while it created its directory."""
    return path.name in BEFORE_CONFIG or path.name in {f".{name}.partial" for name in (*BEFORE_CONFIG, CONFIG)}


def refuse_if_taken(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`RunError` unless ``path`` can be created, is an empty directory, or a run that may be replaced."""
    require_writable(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        kind = "a file" if os.path.exists(path) else "a link to what does not exist"
        raise RunError(f"is {kind}", where=path, hint="--out must name a directory")
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise RunError("cannot be read and written to", where=path)
    if found := contents(path):
        if not (path / CONFIG).is_file() and all(map(left_by_a_kill, found)):
            return
        if not (path / CONFIG).is_file():
            raise RunError("is not empty and not a run, so it is not touched", where=path, hint="choose another --out")
        if not overwrite:
            raise RunError(
                "already holds a run",
                where=path,
                hint=f"resume it with 'tether resume {path}', replace it with --overwrite, or choose another --out",
            )


class RunDirectory:
    """The directory of a run, filled when there is first something to write.

    A run that fails before its first row, say because a reward function raises, therefore leaves nothing behind, and a
    run that it was to replace still exists. As a context manager it is locked against other processes.
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
        given: str = "",
    ) -> None:
        """``fingerprints`` are those of the run's inputs, ``data`` the findings in them, ``skipped`` the rows left out;
        each has a file. A run that is ``resumed`` already has its directory. ``given`` is ``path`` as the person wrote
        it."""
        if not resumed:
            refuse_if_taken(path, overwrite=overwrite)
        self.path, self.config, self.overwrite = path, config, overwrite
        self.fingerprints, self.data, self.skipped = dict(fingerprints or {}), data, skipped
        self.made = resumed
        self.given = given or str(path)
        self.lock: lock.Lock | None = None
        self.new: list[Path] = []
        """Directories created for the lock alone, innermost first."""

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
        """Remove those of the created directories that are empty."""
        for path in self.new:
            if any(path.iterdir()):
                break
            path.rmdir()

    def make(self) -> None:
        """Remove what may be replaced and write ``config.yaml``; only once."""
        if self.made:
            return
        refuse_if_taken(self.path, overwrite=self.overwrite)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for old in sorted(contents(self.path), key=lambda path: path.name == CONFIG):
                remove(old)  # config.yaml last: as long as it exists, the rest may be replaced
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
                for file in contents(self.path):  # without config.yaml it is not a run, and would only be in the way
                    remove(file)
            raise

    def describe(self) -> None:
        """Write ``fingerprints.json`` and ``config.yaml``, which makes the directory a run directory."""
        self.write_json(FINGERPRINTS, self.fingerprints)
        with atomic_write(self.path / CONFIG) as partial:
            partial.write_text(yaml.safe_dump({"format": FORMAT, **self.config}, sort_keys=False), encoding="utf-8")

    def is_described(self) -> bool:
        """Whether ``config.yaml`` holds the run's configuration as it is now."""
        saved = read_flat_yaml(self.path / CONFIG)
        return saved == {"format": FORMAT, **self.config}

    def write_json(self, name: str, value: Any, *, durable: bool = False) -> None:
        """Write a JSON file, or replace it as a whole."""
        with atomic_write(self.path / name, durable=durable) as partial:
            partial.write_text(to_json(value, indent=2, ascii_only=True), encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append one row to ``metrics.jsonl``."""
        self.append(ROWS, [metrics])

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to one of the files that grow: all of them, or none and an error."""
        assert name in GROWING, name
        self.make()
        file = self.path / name
        lines = "".join(to_json(row) + "\n" for row in rows)
        with writing(file):
            before = file.stat().st_size if file.exists() else 0
            try:
                with file.open("a", encoding="utf-8") as out:
                    out.write(lines)
            except OSError:
                os.truncate(file, before)
                raise

    def alarms(self) -> list[dict[str, Any]]:
        """The rows of ``alarms.jsonl``."""
        file = self.path / ALARMS
        return [json.loads(line) for line in file.read_bytes().splitlines()] if file.is_file() else []

    def rollouts(
        self, step: int, groups: Sequence[ScoredGroup], figures: Sequence[Sequence[CompletionFigures]] = ()
    ) -> None:
        """Write one row per completion: texts, ids, mask, log-probs, finish reason, score and its parts, what its
        rewards logged of it, and the ``figures`` of its tokens where there are some."""
        self.make()
        table = rollout_table(step, groups, figures)
        target = self.path / "rollouts" / f"step_{step:06d}.parquet"
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        write_table(target, table)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a jsonl file, or replace it as a whole."""
        self.make()
        lines = [to_json(row) + "\n" for row in rows]
        with atomic_write(self.path / name) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``: the run is finished."""
        self.make()
        self.write_json(SUMMARY, summary, durable=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that grow, after they have reached the disk."""
        files = [self.path / name for name in GROWING if (self.path / name).is_file()]
        with writing(self.path):
            for file in files:
                sync_one(file)
        return {file.name: file.stat().st_size for file in files}

    def cut_back(self, sizes: Mapping[str, int], *, step: int) -> None:
        """Remove what was written past ``step``, when the files that grow had these ``sizes``."""
        for name in GROWING:
            file, size = self.path / name, sizes.get(name, 0)
            found = file.stat().st_size if file.is_file() else 0
            if found < size:
                raise RunError(
                    f"has {found} bytes and had {size} at the checkpoint; rows of it were removed", where=file
                )
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
        remove(self.path / SUMMARY)  # the run is no longer finished


def rollout_table(step: int, groups: Sequence[ScoredGroup], figures: Sequence[Sequence[CompletionFigures]] = ()) -> Any:
    """The rollouts of a step as a ``pyarrow.Table``; ``figures`` has one entry per completion of each group, or none at
    all. Its types do not depend on the values, so that the files of a run are one data set even where a reward applies
    to no completion of a step."""
    import pyarrow

    parts = dict.fromkeys(name for group in groups for score in group.scores for name in score.parts)
    extra = dict.fromkeys(name for group in groups for score in group.scores for name in score.extra)
    episodes = any(completion.turns for group in groups for completion in group.rollouts.completions)
    numbers = pyarrow.list_(pyarrow.float64())
    types = {
        "step": pyarrow.int64(),
        "prompt": pyarrow.string(),
        "completion": pyarrow.string(),
        "completion_ids": pyarrow.list_(pyarrow.int64()),
        "mask": pyarrow.list_(pyarrow.bool_()),
        "sampler_logp": numbers,
        "ref_logp": numbers,
        "advantages": numbers,
        "finish_reason": pyarrow.string(),
        "weights_version": pyarrow.int64(),
        "score": pyarrow.float64(),
        **{f"rewards/{name}": pyarrow.float64() for name in parts},
        **{f"extra/{name}": pyarrow.string() for name in extra},
        **({"turn_rewards": numbers} if episodes else {}),
        "kl": pyarrow.float64(),
        "advantage": pyarrow.float64(),
    }
    known: list[CompletionFigures | None] = [one for group in figures for one in group]
    completions = [
        (group.rollouts.prompt, completion, score)
        for group in groups
        for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
    ]
    rows = [
        {
            "step": step,
            "prompt": prompt.text,
            "completion": completion.text,
            "completion_ids": list(completion.ids),
            "mask": list(completion.mask),
            "sampler_logp": list(completion.sampler_logp),
            "finish_reason": completion.finish_reason.value,
            "weights_version": completion.weights_version,
            "score": score.total,
            **{f"rewards/{name}": score.parts.get(name) for name in parts},
            **{f"extra/{name}": score.extra.get(name) for name in extra},
            **({"turn_rewards": [turn.reward for turn in completion.turns]} if episodes else {}),
            **(figure_columns(completion, found) if found is not None else {}),
        }
        for (prompt, completion, score), found in zip(completions, known or [None] * len(completions), strict=True)
    ]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(types.items())))


def figure_columns(completion: Completion, found: CompletionFigures) -> dict[str, Any]:
    """The figures of a completion per token, and over the tokens that the policy emitted: ``kl``, the sum of
    sampler_logp - ref_logp in nats, and ``advantage``, the mean."""
    emitted = [i for i, own in enumerate(completion.mask) if own]
    columns: dict[str, Any] = {
        "ref_logp": list(found.ref_logp),
        "kl": math.fsum(completion.sampler_logp[i] - found.ref_logp[i] for i in emitted),
    }
    if found.advantages is not None:
        columns["advantages"] = list(found.advantages)
        columns["advantage"] = math.fsum(found.advantages[i] for i in emitted) / len(emitted)
    return columns


def begun_with(run: Path) -> dict[str, str]:
    """The fingerprints of a run's inputs when it began."""
    file = run / FINGERPRINTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read, so the run cannot be resumed ({error})", where=file) from None
    return dict(found)


def read_metrics(path: Path) -> list[Metrics]:
    """The rows of a run's ``metrics.jsonl``."""
    if not (path / CONFIG).is_file():
        raise RunError(f"not a run directory: {CONFIG} is missing", where=path)
    file = path / ROWS
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):  # str.splitlines splits at more characters
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or error
            raise RunError(
                f"not valid JSON ({reason})", where=f"{file}:{number}", hint="was the run killed here?"
            ) from None
        if not isinstance(row, dict) or not all(isinstance(value, int | float) for value in row.values()):
            raise RunError("a row of metrics is one JSON object of numbers", where=f"{file}:{number}")
        rows.append(row)
    return rows
