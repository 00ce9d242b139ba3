"""Trackers that remember, fail or hang, and a run that dies after a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from runs import LINES
from tether.flags import parse
from tether.observers import Hook, StepRecord
from tether.trackers.rows import Ending, Row, TrackedRun
from tether.training.grpo import GRPO, train


class DiedError(Exception):
    """Stands for whatever ends a process between two checkpoints."""


@dataclass
class Remembering:
    """A tracker in memory, with something to do before each call."""

    rewinds: bool = False
    where: str = ""
    before: Callable[[str], None] = lambda _: None
    runs: list[TrackedRun] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    def start(self, run: TrackedRun) -> Mapping[str, str]:
        self.before("start")
        self.runs.append(run)
        return run.identity or {"id": "first"}

    def log(self, row: Row) -> None:
        self.before(f"log {row.step}")
        self.rows.append(row)

    def finish(self, ending: Ending) -> None:
        self.before("finish")
        self.endings.append(ending)

    def close(self, *, finished: bool) -> None:
        self.before("close")
        self.closed.append(finished)


def raising(when: str, error: BaseException) -> Callable[[str], None]:
    """A ``before`` that raises at one call."""

    def before(call: str) -> None:
        if call == when:
            raise error

    return before


def hanging(when: str, until: threading.Event) -> Callable[[str], None]:
    """A ``before`` that does not return from one call until it may."""

    def before(call: str) -> None:
        if call == when:
            until.wait(60)

    return before


def run(model: str, *more: str, hooks: Sequence[Hook] = ()) -> None:
    """A run of GRPO into ``out/``."""
    arguments = [*LINES["grpo"].split()[1:], "--model", model, "--out", "out", *more]
    train(parse("grpo", GRPO, arguments), hooks=hooks)


def dies_after(step: int, model: str, *more: str) -> None:
    """A run of GRPO into ``out/`` that dies when step ``step`` has been recorded and logged."""

    def die(record: StepRecord) -> None:
        if record.step == step:
            raise DiedError

    with pytest.raises(DiedError):
        run(model, *more, hooks=(die,))
