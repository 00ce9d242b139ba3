"""One view of a run directory: all that the pages show of it, read once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import ConfigError, RunError
from tether.runtime.directory import CONFIG, FINGERPRINTS, SUMMARY, read_metrics
from tether.types import Metrics
from tether.untrusted import read_flat_yaml

EVALUATED = ("reward", "reward_ci95", "kl", "win_rate", "mean_length", "distinct_2")
"""The figures of a held-out evaluation that pages show, as :class:`tether.evaluation.PolicyEvaluation` names them."""

MODELS = ("reference", "policy")
"""The models of a held-out evaluation."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What ``file`` holds that tether does not write there is a :class:`RunError` that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise RunError(f"not as tether writes it ({type(error).__name__}: {error})", where=file) from error


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of a rollout file."""

    prompt: str
    completion: str
    score: float


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a run has left in its directory, finished or not."""

    name: str
    """What the run is called in legends and tables."""
    command: str
    config: Mapping[str, Any]
    rows: Sequence[Metrics]
    """The rows of ``metrics.jsonl``, oldest first."""
    fingerprints: Mapping[str, str]
    """``fingerprints.json``: what the run began with; empty where it has none."""
    summary: Mapping[str, Any]
    """``summary.json``; empty until the run is finished."""
    evaluation: Mapping[str, Metrics]
    """Model (policy, reference) to its figures on held-out prompts, those of :data:`EVALUATED`; empty without any."""
    samples: Sequence[Sample]
    """The newest rollout file, highest score first, without completions that have none; empty where the run writes
    none."""

    @staticmethod
    def read(path: Path, *, name: str | None = None, samples: bool = True) -> RunView:
        """The run in ``path``, called ``name`` or by its directory, with its ``samples`` or without.

        Raises :class:`RunError`, with the file at fault, where there is no run or where it holds what tether does not
        write; :class:`ConfigError` for ``config.yaml``.
        """
        with reading(path):
            rows = read_metrics(path)
        config = read_flat_yaml(path / CONFIG)
        summary = _json_object(path / SUMMARY)
        with reading(path / SUMMARY):
            evaluation = {
                model: {figure: float(found[figure]) for figure in EVALUATED}
                for model in MODELS
                if (found := (summary.get("evaluation") or {}).get(model))
            }
        return RunView(
            name=name or path.absolute().name,
            command=str(config.get("command", "run")),
            config=config,
            rows=rows,
            fingerprints=_json_object(path / FINGERPRINTS),
            summary=summary,
            evaluation=evaluation,
            samples=_newest_samples(path / "rollouts") if samples else [],
        )

    @property
    def reward_parts(self) -> list[str]:
        """The metrics that are the mean of one reward, sorted."""
        names = {name for row in self.rows for name in row}
        return sorted(name for name in names if name.startswith("rewards/") and name.endswith("/mean"))

    @property
    def step(self) -> int:
        """The newest step in ``metrics.jsonl``; 0 before the first."""
        return round(self.last("step") or 0)

    @property
    def total(self) -> int | None:
        """Steps or rounds of the whole run; None where the data decide."""
        found = self.config.get("steps", self.config.get("rounds"))
        return found if isinstance(found, int) else None

    def last(self, metric: str) -> float | None:
        """The newest value of a metric; None where the run has none."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def best_and_worst(self, most: int) -> list[Sample]:
        """Of the samples, the ``most // 2`` with the highest and with the lowest score; all where they are few."""
        if len(self.samples) <= most:
            return list(self.samples)
        return [*self.samples[: most // 2], *self.samples[-(most // 2) :]]


def run_names(paths: Sequence[Path]) -> list[str]:
    """What several runs are called: by their directories where those differ, or else by their paths. Raises
    :class:`ConfigError` where one is given twice."""
    names = [path.absolute().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError("given twice", where=name)
    return names


def _json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not file.is_file():
        return {}
    with reading(file):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it holds one JSON object")
        return found


def _newest_samples(directory: Path) -> list[Sample]:
    files = sorted(directory.glob("*.parquet"))
    if not files:
        return []
    import pyarrow.parquet

    with reading(files[-1]), files[-1].open("rb") as file:  # pyarrow takes some names for addresses
        table = pyarrow.parquet.read_table(file, columns=["prompt", "completion", "score"])
        scored = [row for row in table.to_pylist() if row["score"] is not None]
        rows = sorted(scored, key=lambda row: -row["score"])
        return [
            Sample(prompt=str(row["prompt"]), completion=str(row["completion"]), score=float(row["score"]))
            for row in rows
        ]
