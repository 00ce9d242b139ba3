"""The held-out completions of runs, as comparisons read them: from a run's own file, or from a quickstart's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.evaluation import EVALUATION
from tether.report.files import reading
from tether.report.quickstart import GOLD, PROXY, SAMPLES, TITLES, is_quickstart
from tether.report.state import unfinished
from tether.report.view import RunView, run_names
from tether.rewards.resolve import part_names, split_name, split_weight
from tether.statistics import known, mean_difference, mean_score, win_share

SCORE = "score"
"""The figure that is the total reward; the others are ``rewards/NAME``."""
Scores = Mapping[str, tuple[float | None, ...]]
"""Prompt to the figure of each of its completions, in their order; None where none applies."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out completions of one model."""

    scores: Mapping[str, Scores]
    """Figure (:data:`SCORE`, ``rewards/NAME``) to its values."""
    kl: Scores
    """Nats per completion; empty where the file does not hold them."""
    length: Scores
    """Tokens per completion; empty where the file does not hold them."""
    texts: Mapping[str, tuple[str, ...]]
    """Prompt to its completions."""
    seed: int | None
    """The seed of all completions; None where the seeds are the same as those of the other models of the file."""

    @property
    def completions(self) -> int:
        return sum(map(len, next(iter(self.scores.values())).values()))


def means(values: Scores) -> list[float]:
    """The mean over its completions of each prompt that has one."""
    return known(map(mean_score, values.values()))


def differences(own: HeldOut, other: HeldOut, figure: str) -> list[float]:
    """One difference of means per prompt that both have a figure for (:func:`tether.statistics.mean_difference`)."""
    mine, theirs = own.scores[figure], other.scores[figure]
    return known(mean_difference(mine[prompt], theirs[prompt]) for prompt in mine if prompt in theirs)


def win_shares(own: HeldOut, other: HeldOut, figure: str) -> list[float]:
    """One share of comparisons won per prompt that both have (:func:`tether.statistics.win_share`)."""
    mine, theirs = own.scores[figure], other.scores[figure]
    same = own.seed == other.seed and all(len(row) == len(theirs.get(prompt, row)) for prompt, row in mine.items())
    return known(win_share(mine[prompt], theirs[prompt], same_seeds=same) for prompt in mine if prompt in theirs)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One policy that is compared with others: a run, or a method of a quickstart."""

    name: str
    view: RunView | None
    """None for the base model of a quickstart, which no run has trained."""
    policy: HeldOut | None = None
    """None where the run has no file of held-out completions."""
    reference: HeldOut | None = None
    """None for the policy that is the reference itself, too."""
    rewards: Mapping[str, str]
    """Figure to what it is a figure of; two runs whose figures are of one thing can be compared by them."""
    trained_on: frozenset[str]
    """The figures that the policy was trained to raise."""
    metrics: Mapping[str, str]
    """Figure to the metric that is its mean over a step's samples."""
    kl: float | None = None
    """Nats per completion; None where it has to be computed from the completions, or is unknown."""
    length: float | None = None
    """Tokens per completion, as :attr:`kl`."""
    seconds: float | None = None
    unfinished: str = ""
    """How far a run has come that is not finished (:func:`tether.report.state.unfinished`)."""
    chosen_on_held_out: bool = False
    """Whether the step of the policy was chosen by a figure on the held-out prompts."""
    base: str
    """What the reference is; KL to different ones is not comparable."""

    def has(self, figure: str) -> bool:
        """Whether the figure is known, from held-out completions if there are some, or else from training."""
        if self.policy is not None:
            return figure in self.policy.scores and figure in self.rewards
        return self.view is not None and self.view.last(self.metrics.get(figure, "")) is not None


def read_candidates(paths: Sequence[Path]) -> list[Candidate]:
    """What is compared: each run, and of a quickstart's directory each of its methods."""
    found = []
    for path, name in zip(paths, run_names(paths), strict=True):
        if is_quickstart(path):
            found += quickstart_candidates(path, prefix=f"{name}/" if len(paths) > 1 else "")
        else:
            found.append(run_candidate(path, name))
    return found


def run_candidate(path: Path, name: str) -> Candidate:
    """A run, finished or not."""
    view = RunView.read(path, name=name)
    models = read_evaluation(path / EVALUATION) if (path / EVALUATION).is_file() else {}
    with reading(path / "config.yaml"):
        rewards, trained_on = rewards_of(view.config, view.fingerprints)
    return Candidate(
        name=name,
        view=view,
        policy=models.get("policy"),
        reference=models.get("reference"),
        rewards=rewards,
        trained_on=trained_on,
        metrics={figure: "reward" if figure == SCORE else f"{figure}/mean" for figure in rewards},
        seconds=view.summary.get("seconds"),
        unfinished=unfinished(path, view),
        chosen_on_held_out=chosen_on_held_out(view),
        base=view.fingerprints.get("model", ""),
    )


def chosen_on_held_out(view: RunView) -> bool:
    """Whether ``keep_best`` chose the step of ``model/`` by a metric of the evaluations on held-out prompts."""
    return bool(view.summary.get("best")) and str(view.config.get("keep_best")).removeprefix("-").startswith("eval/")


def rewards_of(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """Figure to what it is a figure of, and the figures that are trained on, from the options of a run.

    A reward model is what its fingerprint says, wherever it lies; other rewards are what their SPEC says. The members
    of a reward belong to it. A run that is trained on no reward, as in DPO, has the first evaluation reward as its
    total.
    """
    given = [split_name(value) for value in config.get("reward") or ()]
    weighted = [(name, *split_weight(rest)) for name, rest in given]
    what, weights = {}, {}
    for name, (_, spec, weight) in zip(part_names([(name, spec) for name, spec, _ in weighted]), weighted, strict=True):
        what[name], weights[name] = fingerprints.get(f"reward {name}", spec), weight
    judges = [split_name(value) for value in config.get("eval_reward") or ()]
    for name, (_, spec) in zip(part_names(judges), judges, strict=True):
        first = not given and not what
        what[name], weights[name] = fingerprints.get(f"eval_reward {name}", spec), float(first)
    total = " + ".join(sorted(f"{weight:g} * {what[name]}" for name, weight in weights.items() if weight))
    raised = {SCORE} | {f"rewards/{name}" for name, weight in weights.items() if weight}
    return (
        {SCORE: total} | {f"rewards/{name}": spec for name, spec in what.items()},
        frozenset(raised if given else ()),
    )


def read_evaluation(file: Path) -> dict[str, HeldOut]:
    """Model to its held-out completions, from a run's :data:`tether.evaluation.EVALUATION`."""
    import pyarrow.parquet

    with reading(file), file.open("rb") as source:
        rows = pyarrow.parquet.read_table(source).to_pylist()
        return {
            str(model): held_out([row for row in rows if row["model"] == model])
            for model in dict.fromkeys(row["model"] for row in rows)
        }


def held_out(rows: Sequence[Mapping[str, Any]]) -> HeldOut:
    """The rows of one model."""
    figures = [name for name in rows[0] if name == SCORE or name.startswith("rewards/")]
    return HeldOut(
        scores={name: by_prompt(rows, name) for name in figures},
        kl=by_prompt(rows, "kl"),
        length=by_prompt(rows, "length"),
        texts=texts_of(rows),
        seed=int(rows[0]["seed"]),
    )


def by_prompt(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, tuple[float | None, ...]]:
    """A column of rows by their prompt. Two prompts of one text are one."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        value = row[column]
        found.setdefault(str(row["prompt"]), []).append(None if value is None else float(value))
    return {prompt: tuple(row) for prompt, row in found.items()}


def texts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The completions of rows by their prompt."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(str(row["prompt"]), []).append(str(row["completion"]))
    return {prompt: tuple(row) for prompt, row in found.items()}


def quickstart_candidates(path: Path, *, prefix: str) -> list[Candidate]:
    """The base model and the methods of a quickstart, from its ``samples.jsonl`` and ``summary.json``."""
    with reading(path):
        methods = RunView.read(path).summary["methods"]
    file = path / SAMPLES
    with reading(file):
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        models = {name: quickstart_model([row for row in rows if row["method"] == name]) for name in methods}
    return [
        Candidate(
            name=f"{prefix}{TITLES[name]}",
            view=None if name == "base" else RunView.read(path / name, name=f"{prefix}{TITLES[name]}"),
            policy=models[name],
            reference=None if name == "base" else models["base"],
            rewards={"rewards/gold": "sentiment", "rewards/proxy": f"the proxy of {path.absolute()}"},
            trained_on=frozenset({"rewards/proxy"}),
            metrics={"rewards/gold": GOLD, "rewards/proxy": PROXY},
            kl=found["kl"],
            length=found["mean_length"],
            seconds=found["seconds"],
            base=str(path.absolute()),
        )
        for name, found in methods.items()
    ]


def quickstart_model(rows: Sequence[Mapping[str, Any]]) -> HeldOut:
    """The rows of one method of a quickstart; all methods have the same seeds."""
    return HeldOut(
        scores={f"rewards/{figure}": by_prompt(rows, figure) for figure in ("gold", "proxy")},
        kl={},
        length={},
        texts=texts_of(rows),
        seed=None,
    )
