"""One view of a run directory: all that the pages show of it, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tether.errors import ConfigError
from tether.observers import Alarm
from tether.report.completions import Sample, read_completions
from tether.report.files import json_object, json_rows, reading
from tether.runtime.directory import ALARMS, CONFIG, FINGERPRINTS, SUMMARY, read_metrics
from tether.types import Metrics
from tether.untrusted import read_flat_yaml

EVALUATED = ("reward", "reward_ci95", "kl", "win_rate", "mean_length", "distinct_2")
"""The figures of a held-out evaluation that pages show, as :class:`tether.evaluation.PolicyEvaluation` names them."""

MODELS = ("reference", "policy")
"""The models of a held-out evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a run has left in its directory, finished or not."""

    path: Path
    """The run directory."""
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
    alarms: Sequence[tuple[int, Alarm]]
    """The alarms that its monitors raised, with their steps, oldest first."""
    samples: Sequence[Sample]
    """The newest rollout file, highest score first, without completions that have none; empty where the run writes
    none."""
    first_samples: Sequence[Sample]
    """The oldest one, likewise; empty where there is only one."""

    @staticmethod
    def read(path: Path, *, name: str | None = None, samples: bool = True) -> RunView:
        """The run in ``path``, called ``name`` or by its directory, with its ``samples`` or without.

        Raises :class:`RunError`, with the file at fault, where there is no run or where it holds what tether does not
        write; :class:`ConfigError` for ``config.yaml``.
        """
        with reading(path):
            rows = read_metrics(path)
        config = read_flat_yaml(path / CONFIG)
        summary = json_object(path / SUMMARY)
        with reading(path / SUMMARY):
            evaluation = {
                model: {figure: float(found[figure]) for figure in EVALUATED}
                for model in MODELS
                if (found := (summary.get("evaluation") or {}).get(model))
            }
        files = sorted((path / "rollouts").glob("*.parquet")) if samples else []
        return RunView(
            path=path,
            name=name or path.absolute().name,
            command=str(config.get("command", "run")),
            config=config,
            rows=rows,
            fingerprints=json_object(path / FINGERPRINTS),
            summary=summary,
            evaluation=evaluation,
            alarms=raised(path / ALARMS),
            samples=by_score(files[-1]) if files else [],
            first_samples=by_score(files[0]) if len(files) > 1 else [],
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


def raised(file: Path) -> list[tuple[int, Alarm]]:
    """The alarms in ``alarms.jsonl``, with their steps."""
    known = {entry.name for entry in fields(Alarm)}
    found = []
    for row in json_rows(file):
        with reading(file):
            given = {name: value for name, value in row.items() if name in known - {"examples"}}
            texts = {name: str(value) for name, value in given.items() if name not in ("since", "stop")}
            examples = tuple(map(str, row.get("examples", ())))
            found.append((int(row["step"]), Alarm(**given | texts, examples=examples)))
    return found


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


def by_score(file: Path) -> list[Sample]:
    """The completions of a rollout file that have a score, highest first."""
    scored = [(one.score, one) for one in read_completions(file) if one.score is not None]
    return [one for _, one in sorted(scored, key=lambda pair: -pair[0])]
