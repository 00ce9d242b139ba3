"""What a tracker is given: plain data, so that it can be sent later and elsewhere while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tether.observers import StepRecord
from tether.types import Completion, Metrics, Prompt, Score
from tether.untrusted import one_line, redacted

Cell = str | float | None

TABLES = 20
"""Tables of samples per run, at most."""
SAMPLES = 8
"""Completions per table, at most."""
PROJECT = "tether"
"""The project, or experiment, that runs are in unless the user's settings name one."""
FINAL = "final/"
"""How the names of the figures of ``summary.json`` begin in a tracker."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run, as a tracker begins with it."""

    name: str
    """The name of its directory."""
    directory: Path
    config: Mapping[str, Any]
    """Its options, as ``config.yaml`` has them, without passwords in addresses."""
    identity: Mapping[str, str]
    """What :meth:`Backend.start` returned when the run began; empty for a new run."""
    first: int | None
    """The step that is logged first; None where none is left."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recorded step."""

    step: int
    metrics: Metrics
    """The row of ``metrics.jsonl``, without the step."""
    samples: tuple[Mapping[str, Cell], ...] = ()
    """Some completions of the step, with the same columns each; empty where no table is due."""
    alarms: tuple[tuple[str, str], ...] = ()
    """Monitor and message."""

    def with_table(self, table: Callable[..., Any]) -> dict[str, Any]:
        """The metrics, and under ``samples`` a tracker's own ``table(columns=, data=)`` where one is due."""
        if not self.samples:
            return dict(self.metrics)
        data = [list(sample.values()) for sample in self.samples]
        return {**self.metrics, "samples": table(columns=list(self.samples[0]), data=data)}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A run that is finished."""

    step: int
    """The last one."""
    summary: Mapping[str, Any]
    """What ``summary.json`` holds."""
    report: Path | None
    """``report.html``; None where it could not be made."""

    @property
    def figures(self) -> Metrics:
        """The numbers of the summary under names such as ``final/evaluation/policy/reward``, without the last row of
        metrics, which is logged as a step."""
        return dict(numbers({name: value for name, value in self.summary.items() if name != "last"}, FINAL))


class Backend(Protocol):
    """One tracker. Whatever it raises switches it off, and concerns nothing else; all calls come from one thread."""

    rewinds: bool
    """Whether a resumed run takes back the steps after its checkpoint, so that they are logged again; the others keep
    them, and are given no step twice."""
    where: str
    """Once it has started: where the run is shown, or how to look at it; empty where the library says so itself."""

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        """Begin, or continue where ``run.identity`` says how; what the run is found by when it is resumed."""
        ...

    def log(self, row: Row) -> None: ...

    def finish(self, ending: Ending) -> None: ...

    def close(self, *, finished: bool) -> None:
        """Send what is left. Called last, after :meth:`finish` where the run is ``finished``, else without it."""
        ...


def row_of(record: StepRecord, *, samples: bool) -> Row:
    """A step as a tracker is given it, with a table of ``samples`` or without."""
    return Row(
        step=record.step,
        metrics={name: value for name, value in record.metrics.items() if name != "step"},
        samples=tuple(sampled(record)) if samples else (),
        alarms=tuple((alarm.monitor, one_line(alarm.message)) for alarm in record.alarms),
    )


def sampled(record: StepRecord) -> list[Mapping[str, Cell]]:
    """:data:`SAMPLES` completions of a step, evenly spread over its prompts, with their scores."""
    found = [
        (group.rollouts.prompt, completion, score)
        for group in record.groups
        for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
    ]
    parts = dict.fromkeys(name for _, _, score in found for name in score.parts)
    count = min(SAMPLES, len(found))
    chosen = [found[i * len(found) // count] for i in range(count)]
    return [sample(record.step, *one, parts=list(parts)) for one in chosen]


def sample(step: int, prompt: Prompt, completion: Completion, score: Score, *, parts: Sequence[str]) -> dict[str, Cell]:
    """A completion in a table; the columns are named as those of a rollout file."""
    return {
        "step": step,
        "prompt": prompt.text,
        "completion": completion.text,
        "finish_reason": completion.finish_reason.value,
        "score": score.total,
        **{f"rewards/{name}": score.parts.get(name) for name in parts},
    }


def samples_every(rollouts_every: int, total: int) -> int:
    """Steps between tables: a multiple of ``rollouts_every`` that gives at most :data:`TABLES`; 0 gives none.

    >>> samples_every(1, 100), samples_every(3, 100), samples_every(1, 10), samples_every(0, 100)
    (5, 6, 1, 0)
    """
    if not rollouts_every:
        return 0
    return rollouts_every * -(-total // (rollouts_every * TABLES))


def numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by their path behind ``prefix``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the user, the password and the query of the addresses in them."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [cleaned(one) for one in value]
        return redacted(value) if isinstance(value, str) else value

    return {name: cleaned(value) for name, value in config.items()}
