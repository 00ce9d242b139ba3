"""``tether frontier``: rewards of runs against their distance from the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text

from tether.commands import TABLE, find
from tether.config import PromptOptions, SampleOptions
from tether.errors import ConfigError, RunError
from tether.flags import POSITIONAL, parse
from tether.looking.evaluate import Eval, sampled_policies
from tether.looking.terminal import grid, rendered, show
from tether.ops.frontier import best_of_n_kl_of
from tether.ops.selection import selection_weights
from tether.report.comparison import NONE
from tether.report.files import reading
from tether.report.frontier import PROXY, Line, Point, as_data, line_of_run, panels
from tether.report.held_out import rewards_of
from tether.report.plots import figure, require_matplotlib
from tether.report.quickstart import runs_in
from tether.report.view import RunView, run_names
from tether.runtime.directory import CONFIG
from tether.runtime.files import atomic_write, writing
from tether.runtime.json_text import to_json
from tether.statistics import mean_interval
from tether.types import ScoredGroup
from tether.untrusted import printable

NAMES = ("frontier.json", "frontier.png")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Reward against the distance from the reference: of runs, by their own reward and by another one; and of best of n
    from the model that they began with. Says where the other reward peaks."""

    runs: tuple[str, ...] = field(metadata={POSITIONAL: "RUN"})
    """Run directories of ppo or grpo, or of a quickstart, which stands for those in it."""
    gold: str | None = None
    """Part of the reward that no run was trained on, by which they are judged. By default the only one of weight 0."""
    best_of: int = 0
    """Completions per prompt of the model that the first run began with, for the curve of best of n; none unless
    given."""
    best_of_prompts: int = 16
    """Prompts of that curve, the first ones of the run's."""
    out: str | None = None
    """Directory for frontier.json and frontier.png; a table alone unless given."""
    json: bool = False
    """Print frontier.json instead of the table."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "best_of must be 0, or at least 2": self.best_of == 0 or self.best_of >= 2,
                "best_of_prompts must be at least 2": self.best_of_prompts >= 2,
            },
        )


def main(command: Frontier) -> None:
    paths = runs_in([Path(run) for run in command.runs], methods=("ppo", "grpo"))
    views = [RunView.read(path, name=name, samples=False) for path, name in zip(paths, run_names(paths), strict=True)]
    gold = gold_of(command, views)
    if command.out is not None:
        require_matplotlib()
    lines = [run_line(view) for view in views]
    if command.best_of:
        lines.append(best_of_line(views[0], command))
    rewards = [PROXY, *([gold] if gold is not None else [])]
    lines = [line.fitted(rewards) for line in lines]
    data = as_data(lines, rewards)
    if command.out is not None:
        write(Path(command.out), data, lines, rewards)
    show(to_json(data, indent=2, ascii_only=True) if command.json else rendered(*in_full(data)))


def gold_of(command: Frontier, views: Sequence[RunView]) -> str | None:
    """The reward that the runs are judged by. Raises :class:`ConfigError` where a run has no such part."""
    parts = [set(view.reward_parts) for view in views]
    shared = {name.removeprefix("rewards/").removesuffix("/mean") for name in set.intersection(*parts)}
    if command.gold is not None:
        if command.gold not in shared:
            raise ConfigError(
                f"not all runs have the reward {command.gold!r}",
                where="--gold",
                hint=f"they have {', '.join(sorted(shared)) or 'none in common'}; give it a weight of 0 in training",
            )
        return command.gold
    with reading(views[0].path / CONFIG):
        figures, trained_on = rewards_of(views[0].config, views[0].fingerprints)
    unused = [
        name for figure in figures if (name := figure.removeprefix("rewards/")) in shared and figure not in trained_on
    ]
    if len(unused) > 1:
        raise ConfigError(f"several rewards have no weight: {', '.join(unused)}", hint="choose one with --gold")
    return unused[0] if unused else None


def run_line(view: RunView) -> Line:
    """The steps of a run. Raises :class:`RunError` where it has none with a KL."""
    group, prompts = view.config.get("group_size"), view.config.get("prompts_per_step")
    per_step = group * prompts if isinstance(group, int) and isinstance(prompts, int) else 0
    parts = [name.removeprefix("rewards/").removesuffix("/mean") for name in view.reward_parts]
    line = line_of_run(view.name, view.rows, parts, completions=max(1, per_step))
    if not line.points:
        raise RunError("has no steps with a reward and a KL", where=view.path, hint="give runs of ppo or grpo")
    return line


def best_of_line(view: RunView, command: Frontier) -> Line:
    """Best of n, from one pool of completions per prompt, with the options of the run."""
    made_by = find(view.command, TABLE)
    assert made_by is not None, "run_line refuses other directories"
    made: Any = parse(made_by.name, made_by.options_class(), ["--config", str(view.path / CONFIG)])
    task: PromptOptions = made.task
    options = SampleOptions(
        group_size=command.best_of,
        seed=made.run.seed,
        data=task.data,
        device=made.run.device,
        environment=task.environment,
        sampling=getattr(made, made_by.name).sampling,
        budget=task.budget,
    )
    asked = Eval(model=(made.model,), prompts=task.prompts, reward=task.reward, calls=task.calls, samples=options)
    (sampled,), _ = sampled_policies(asked, task.prompts, most=command.best_of_prompts)
    sizes = [2**i for i in range(command.best_of.bit_length()) if 2**i <= command.best_of]
    return Line(name="best of n", curve="best-of-n", points=[best_of_point(sampled.groups, n) for n in sizes])


def best_of_point(groups: Sequence[ScoredGroup], n: int) -> Point:
    """The expected best of ``n`` by the total, over all subsets of each prompt's pool, and its KL
    (:func:`tether.ops.frontier.best_of_n_kl_of`)."""
    values: dict[str, list[float]] = {}
    distances = []
    for group in groups:
        if any(score.total is None for score in group.scores):
            continue
        totals = torch.tensor([score.total for score in group.scores], dtype=torch.float64)
        weights = selection_weights(totals, n)
        distances.append(best_of_n_kl_of(totals, n))
        values.setdefault(PROXY, []).append(float(weights @ totals))
        for part in group.scores[0].parts:
            scores = [score.parts.get(part) for score in group.scores]
            if None not in scores:
                values.setdefault(part, []).append(float(weights @ torch.tensor(scores, dtype=torch.float64)))
    kl = mean_interval(distances)
    rewards = {name: (statistics.fmean(found), standard_error(found)) for name, found in values.items()}
    half = kl.half_width if math.isfinite(kl.half_width) else None
    return Point(label=f"best of {n}", kl=kl.value, kl_ci95=half, rewards=rewards)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def write(out: Path, data: dict[str, Any], lines: Sequence[Line], rewards: Sequence[str]) -> None:
    drawn = figure(panels(lines, rewards), columns=len(rewards), width=5.0 * len(rewards), height=3.6)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / NAMES[0]) as partial:
        partial.write_text(to_json(data, indent=2, ascii_only=True), encoding="utf-8")
    with atomic_write(out / NAMES[1]) as partial:
        drawn.savefig(partial, dpi=130, format="png")


def in_full(data: dict[str, Any]) -> list[RenderableType]:
    """The tables, and where the last reward peaks."""
    parts: list[RenderableType] = []
    for reward in data["rewards"]:
        rows = []
        for line in data["lines"]:
            known = [point[reward]["reward"] for point in line["points"] if reward in point]
            figures = [f"{value:.3f}" for value in (known[0], known[-1], max(known))] if known else [NONE] * 3
            kl = f"{line['points'][-1]['kl']:.1f}"
            rows.append([printable(line["name"]), *figures, kl, peak_text(line["fits"].get(reward))])
        parts += [Text(), grid([printable(reward), "first", "last", "highest", "KL", "peak of the fit, nats"], rows)]
    for row in data["trade_offs"]:
        front = "on the front" if row["on_the_front"] else "beaten in every reward"
        parts.append(Text(printable(f"{row['name']}: {front}")))
    return parts


def peak_text(fit: dict[str, Any] | None) -> str:
    if fit is None:
        return "too few points"
    if fit["peak_kl"] is None:
        return "none: it still rises"
    low, high = fit["peak_kl_low"], fit["peak_kl_high"]
    ends = "" if low is None else f" ({low:.1f} to {'beyond' if high is None else f'{high:.1f}'})"
    return f"{fit['peak_kl']:.1f}{ends}" if fit["peak_within_data"] else f"beyond the data, {fit['peak_kl']:.0f}"
