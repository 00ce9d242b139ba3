"""The steps of a run that is over, as monitors see them: of tether's own, of TRL's and of verl's.

    tether   DIR/metrics.jsonl and DIR/rollouts/step_000010.parquet
    TRL      DIR/completions/completions_00010.parquet (``log_completions=True``), with the metrics of its newest
             trainer_state.json
    verl     DIR/10.jsonl (``trainer.rollout_data_dir``)

Completions whose tokens a file does not hold have their words in place of tokens. OpenRLHF writes no rollouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tether.errors import RunError
from tether.monitor.trace import words
from tether.names import closest, did_you_mean
from tether.observers import Alarm
from tether.report.completions import Sample, read_completions
from tether.report.files import json_rows, reading
from tether.report.held_out import rewards_of
from tether.report.view import RunView
from tether.runtime.directory import CONFIG
from tether.types import Completion, FinishReason, Metrics, Prompt, RolloutGroup, Score, ScoredGroup, StepResult, Turn

TRL_FILE, VERL_FILE = re.compile(r"completions_(\d+)\.parquet"), re.compile(r"(\d+)\.jsonl")
OWN_FILE = re.compile(r"step_(\d+)\.parquet")
NO_REWARDS = frozenset({"step", "advantage", "advantages"})
"""Columns of numbers that are no rewards."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run that is over."""

    name: str
    kind: str
    """tether, TRL or verl."""
    judges: tuple[str, ...]
    """Parts of the reward that it was not trained on."""
    compares: bool
    """Whether its algorithm compares the completions of a prompt."""
    steps: Iterator[tuple[int, StepResult]]
    raised: Sequence[tuple[int, Alarm]] = ()
    """The alarms that its own monitors raised, with their steps: these saw also the steps whose rollouts were not
    kept."""


def replay_of(path: Path, *, rewards: Sequence[str] = (), judges: Sequence[str] = ()) -> Replay:
    """The run in ``path``. Of others' files, the total reward is the sum of the columns ``rewards``, or of all columns
    of numbers but the ``judges``. Raises :class:`RunError` where there is none."""
    if (path / CONFIG).is_file():
        return own(path, judges)
    for kind, directories, pattern in (
        ("TRL", (path / "completions", path / "completions" / "train", path), TRL_FILE),
        ("verl", (path,), VERL_FILE),
    ):
        for directory in directories:
            if found := numbered(directory, pattern):
                read = trl_rows if kind == "TRL" else verl_rows
                metrics = trainer_states(path) if kind == "TRL" else {}
                steps = foreign(kind, found, read, rewards, judges, metrics)
                return Replay(name=str(path), kind=kind, judges=tuple(judges), compares=True, steps=steps)
    raise RunError(
        "holds no rollouts that are known",
        where=path,
        hint="give a run of tether, an output_dir of TRL with log_completions, or a rollout_data_dir of verl",
    )


def numbered(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """The files whose whole names match, by their numbers."""
    if not directory.is_dir():
        return []
    return sorted((int(match[1]), file) for file in directory.iterdir() if (match := pattern.fullmatch(file.name)))


# ---------------------------------------------------------------------------------------------------------------- own


def own(path: Path, judges: Sequence[str]) -> Replay:
    view = RunView.read(path, samples=False)
    if view.last("reward") is None:
        raise RunError("has no rewards to watch", where=path, hint="give a run of rejection-sampling, ppo or grpo")
    with reading(path / CONFIG):
        figures, trained_on = rewards_of(view.config, view.fingerprints)
    parts = [name.removeprefix("rewards/") for name in figures if name not in trained_on and name != "score"]
    seen = {name for row in view.rows for name in row}
    parts = [name for name in parts if f"rewards/{name}/mean" in seen]
    return Replay(
        name=str(path),
        kind="tether",
        judges=tuple(judges) or tuple(parts),
        compares=view.command == "grpo",
        steps=own_steps(path, view),
        raised=view.alarms,
    )


def own_steps(path: Path, view: RunView) -> Iterator[tuple[int, StepResult]]:
    files = dict(numbered(path / "rollouts", OWN_FILE))
    for row in view.rows:
        step = int(row["step"])
        groups = grouped([own_completion(one) for one in read_completions(files[step])]) if step in files else ()
        yield step, StepResult(metrics=row, groups=groups)


Scored = tuple[str, Completion, Score]
"""A prompt's text, a completion and its score."""


def own_completion(one: Sample) -> Scored:
    turns = tuple(Turn(start=0, stop=1, reward=reward) for reward in one.row.get("turn_rewards") or ())
    completion = Completion(
        ids=tuple(one.ids),
        mask=tuple(one.row["mask"]),
        sampler_logp=tuple(one.row["sampler_logp"]),
        finish_reason=FinishReason(one.finish_reason),
        text=one.completion,
        weights_version=0,
        turns=turns,
    )
    return one.prompt, completion, Score(total=one.score, parts=one.parts)


def grouped(found: Sequence[Scored]) -> tuple[ScoredGroup, ...]:
    """Completions by their prompt, in the order of its first."""
    groups: dict[str, list[Scored]] = {}
    for one in found:
        groups.setdefault(one[0], []).append(one)
    return tuple(
        ScoredGroup(
            rollouts=RolloutGroup(prompt=Prompt(ids=(), text=text), completions=tuple(one[1] for one in group)),
            scores=tuple(one[2] for one in group),
        )
        for text, group in groups.items()
    )


# ------------------------------------------------------------------------------------------------------------- others


Row = Mapping[str, Any]


def foreign(
    kind: str,
    files: Sequence[tuple[int, Path]],
    read: Any,
    rewards: Sequence[str],
    judges: Sequence[str],
    metrics: Mapping[int, Metrics],
) -> Iterator[tuple[int, StepResult]]:
    for step, file in files:
        with reading(file, writer=kind):
            rows: list[Row] = read(file)
        parts = reward_columns(rows, rewards, judges, file)
        with reading(file, writer=kind):
            groups = grouped([foreign_completion(row, parts, judges) for row in rows])
        totals = [score.total for group in groups for score in group.scores if score.total is not None]
        own = {"reward": fmean(totals)} if totals else {}
        yield step, StepResult(metrics={**metrics.get(step, {}), **own}, groups=groups)


def reward_columns(rows: Sequence[Row], rewards: Sequence[str], judges: Sequence[str], file: Path) -> list[str]:
    """The columns that add up to the reward. Of verl that is ``score``: other columns say how it came about."""
    numbers = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in NO_REWARDS and any(is_number(row.get(name)) for row in rows)
    ]
    for name in (*rewards, *judges):
        if name not in numbers:
            hint = f"{did_you_mean(closest(name, numbers))} it has {', '.join(numbers) or 'none'}".lstrip()
            raise RunError(f"has no column of numbers {name!r}", where=file, hint=hint)
    own = [name for name in numbers if name not in judges]
    return list(rewards) or (["score"] if "score" in own and file.suffix == ".jsonl" else own)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def foreign_completion(row: Row, parts: Sequence[str], judges: Sequence[str]) -> Scored:
    text = as_text(row["completion"])
    count = max(1, len(words(text)))
    completion = Completion(
        ids=tuple(range(count)),
        mask=(True,) * count,
        sampler_logp=(0.0,) * count,
        finish_reason=FinishReason.EOS,
        text=text,
        weights_version=0,
    )
    values = {name: float(row[name]) if is_number(row.get(name)) else None for name in (*parts, *judges)}
    known = [value for name in parts if (value := values[name]) is not None]
    return as_text(row["prompt"]), completion, Score(total=sum(known) if known else None, parts=values)


def as_text(said: object) -> str:
    """Text, or the contents of the turns of a conversation."""
    if isinstance(said, str):
        return said
    if isinstance(said, list) and all(isinstance(turn, dict) for turn in said):
        return "\n".join(str(turn.get("content", "")) for turn in said)
    raise TypeError(f"a text or a conversation is wanted, not {type(said).__name__}")


def trl_rows(file: Path) -> list[Row]:
    import pyarrow.parquet

    with file.open("rb") as source:
        return list(pyarrow.parquet.read_table(source).to_pylist())


def verl_rows(file: Path) -> list[Row]:
    rows: list[Row] = []
    for row in json_rows(file):
        kept = {name: value for name, value in row.items() if name not in ("input", "output", "gts")}
        rows.append({"prompt": row["input"], "completion": row["output"], **kept})
    return rows


def trainer_states(path: Path) -> dict[int, Metrics]:
    """Step to what TRL logged, from its newest ``trainer_state.json``; nothing where there is none."""
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda one: int(re.sub(r"\D", "", one.name) or 0))
    files = [file for file in (path, *reversed(checkpoints)) if (file / "trainer_state.json").is_file()]
    if not files:
        return {}
    file = files[0] / "trainer_state.json"
    with reading(file, writer="TRL"):
        log = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        return {
            int(row["step"]): {name: float(value) for name, value in row.items() if is_number(value)} for row in log
        }
