"""``tether audit``: the monitors, after the fact, on runs of tether and of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tether.errors import ConfigError, GuardError
from tether.flags import POSITIONAL
from tether.looking.replay import Replay, replay_of
from tether.looking.terminal import rendered, show
from tether.monitor.usual import usual_monitors
from tether.observers import Alarm
from tether.report.quickstart import runs_in
from tether.runtime.json_text import to_json
from tether.untrusted import printable


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Watch runs that are over, as monitors would have: runs of tether, completions that TRL logged, rollouts that verl
    wrote. Exit code 0: nothing was found; 3: something was."""

    paths: tuple[str, ...] = field(metadata={POSITIONAL: "PATH"})
    """Run directories; a quickstart's stands for the runs in it."""
    reward: tuple[str, ...] = ()
    """Of TRL's and verl's files, a column that is part of the reward; repeatable. By default all columns of numbers but
    the judges, of verl the score."""
    judge: tuple[str, ...] = ()
    """Column or part of the reward that the run was not trained on; repeatable. Of tether's runs, by default those of
    weight 0."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        both = sorted(set(self.reward) & set(self.judge))
        ConfigError.unless(self, {f"{', '.join(both)} is given as a reward and as a judge": not both})


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What was found in one run."""

    path: str
    kind: str
    steps: int
    kept: int
    """Steps whose completions were kept."""
    completions: int
    judges: tuple[str, ...]
    alarms: tuple[tuple[int, Alarm], ...]
    """With their steps."""


def main(command: Audit) -> None:
    paths = runs_in([Path(path) for path in command.paths])
    found = [audited(replay_of(path, rewards=command.reward, judges=command.judge)) for path in paths]
    show(to_json([as_data(one) for one in found], indent=2, ascii_only=True) if command.json else in_full(found))
    if alarmed := [one for one in found if one.alarms]:
        count = sum(len(one.alarms) for one in alarmed)
        raise GuardError(f"{count} alarm{'s' * (count > 1)}", where=", ".join(one.path for one in alarmed))


def audited(run: Replay) -> Audited:
    """Every monitor on every step, and what the monitors of the run had found."""
    monitors = usual_monitors(judges=run.judges, compares=run.compares)
    alarms, known = list(run.raised), {(alarm.monitor, alarm.phrase) for _, alarm in run.raised}
    steps = kept = completions = 0
    for step, result in run.steps:
        steps, kept = steps + 1, kept + bool(result.groups)
        completions += sum(len(group.scores) for group in result.groups)
        said = [one for monitor in monitors for one in monitor.watch(step, result)]
        alarms += [(step, one) for one in said if isinstance(one, Alarm) and (one.monitor, one.phrase) not in known]
    return Audited(
        path=run.name,
        kind=run.kind,
        steps=steps,
        kept=kept,
        completions=completions,
        judges=run.judges,
        alarms=tuple(sorted(alarms, key=lambda pair: pair[0])),
    )


def as_data(one: Audited) -> dict[str, Any]:
    alarms = [{"step": step, **asdict(alarm)} for step, alarm in one.alarms]
    return {**asdict(one), "alarms": alarms, "verdict": verdict(one)}


def verdict(one: Audited) -> str:
    """In words."""
    of = f"{one.steps} steps of {one.kind}, with the {one.completions} completions of {one.kept}"
    if not one.alarms:
        return f"nothing found in {of}"
    names = dict.fromkeys(alarm.monitor for _, alarm in one.alarms)
    first = min(step for step, _ in one.alarms)
    return f"{', '.join(names)} in {of}, first at step {first}"


def in_full(found: Sequence[Audited]) -> str:
    parts: list[RenderableType] = []
    for one in found:
        parts.append(Text(printable(f"{one.path}: {verdict(one)}"), style="bold"))
        for step, alarm in one.alarms:
            parts.append(Text(printable(f"  step {step}, {alarm.monitor}: {alarm.message}")))
            parts += [Text(printable(f"    | {text}"), style="dim") for text in alarm.examples]
            if alarm.advice:
                parts.append(Text(printable(f"    {alarm.advice}")))
    return rendered(*parts)
