"""The plots of one run and of several: metrics over steps, and reward against KL."""

from __future__ import annotations

from collections.abc import Sequence

from tether.report.plots import COLOURS, STEP, Panel, Series, series_of
from tether.report.view import RunView
from tether.runtime.metric_names import EVALUATED

REWARD = ("Reward", ("reward", "reward/selected"))
HELD_OUT = ("Reward on held-out prompts", ("eval/reward",))
OTHERS = (
    ("KL to the reference, nats per completion", ("kl",)),
    ("KL on held-out prompts, nats per completion", ("eval/kl",)),
    ("Loss", ("loss", "loss/policy", "loss/value", "eval/loss")),
    ("Accuracy", ("accuracy", "eval/accuracy", "rewards/accuracies", "eval/rewards/accuracies")),
    ("Rewards that the policy implies", ("rewards/chosen", "rewards/rejected")),
    ("Their margin", ("rewards/margins", "eval/rewards/margins")),
    ("Log-probs of both sides, nats", ("logps/chosen", "logps/rejected")),
    ("Entropy, nats per token", ("entropy",)),
    ("Completion length, tokens", ("completions/mean_length",)),
    ("Gradient norm", ("grad_norm",)),
    ("Sampler and trainer log-probs, gap in nats", ("sampling/logprob_gap_mean", "sampling/logprob_gap_max")),
    ("Tokens with other experts in training than in sampling, share", ("sampling/expert_gap",)),
    ("Seconds per step", ("step_time",)),
)
"""Title and metrics of each plot; one whose metrics a run does not have is left out."""
FROM_ZERO = frozenset(
    {"kl", "eval/kl", "entropy", "completions/mean_length", "grad_norm", "step_time"}
    | {"sampling/logprob_gap_mean", "sampling/logprob_gap_max", "sampling/expert_gap"}
)
"""Metrics whose axis begins at zero: they are sizes, and their changes are seen in proportion."""


def shown_metrics(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """Title and metrics of the plots that these runs can fill, the parts of the reward included."""
    held = {name for view in views for row in view.rows for name in row}
    parts = sorted({name for view in views for name in view.reward_parts})
    judged = sorted(name for name in held - set(EVALUATED["dpo"]) if name.startswith("eval/rewards/"))
    groups = (REWARD, ("Parts of the reward", parts), HELD_OUT, ("Each reward on held-out prompts", judged), *OTHERS)
    found = [(title, [name for name in names if name in held]) for title, names in groups]
    return [(title, names) for title, names in found if names]


def panels_of(views: Sequence[RunView]) -> list[Panel]:
    """Metrics over steps. One run has a panel per kind of metric, with a curve per metric; several have a panel per
    metric, with a curve per run."""
    if len(views) == 1:
        return [_of_one(views[0], title, names) for title, names in shown_metrics(views)]
    panels = [
        over_steps(views, name, title=title if len(names) == 1 else name)
        for title, names in shown_metrics(views)
        for name in names
    ]
    return [panel for panel in panels if panel.series]


def _of_one(view: RunView, title: str, metrics: Sequence[str]) -> Panel:
    series = [series_of(view.rows, name, label=name, colour=colour_of(i)) for i, name in enumerate(metrics)]
    marks = sorted({float(step) for step, _ in view.alarms})
    return Panel(title=title, x_label=STEP, y_label="", series=series, y_from=floor_of(metrics), marks=marks)


def floor_of(metrics: Sequence[str]) -> float | None:
    """Where the axis of some metrics begins."""
    return 0.0 if FROM_ZERO.issuperset(metrics) else None


def over_steps(views: Sequence[RunView], metric: str, *, title: str) -> Panel:
    """One metric over the steps of several runs."""
    series = curves(views, [metric] * len(views))
    return Panel(title=title, x_label=STEP, y_label="", series=series, y_from=floor_of([metric]))


def against_kl(paths: Sequence[Series], held_out: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Panel:
    """A reward over the KL that it cost: the ``paths`` of training samples (:func:`paths_over_kl`), and a point per
    policy (:func:`held_out_point`)."""
    return Panel(title=title, x_label=x_label, y_label=y_label, series=[*paths, *held_out], x_from=0.0)


def paths_over_kl(views: Sequence[RunView], metrics: Sequence[str], *, suffix: str = "") -> list[Series]:
    """The path of each run's training samples, labelled with its name and ``suffix``; none of a run of one row."""
    return [one for one in curves(views, metrics, x="kl", suffix=suffix) if len(one.x) > 1]


def held_out_point(label: str, colour: str, *, kl: float, reward: float, ci95: float | None = None) -> Series:
    """Where a policy stands on held-out prompts, with its 95% interval where that is known."""
    error = None if ci95 is None else [ci95]
    return Series(label=label, x=[kl], y=[reward], colour=colour, points=True, error=error)


def colour_of(i: int) -> str:
    """The colour of run or series ``i``; they repeat."""
    return COLOURS[i % len(COLOURS)]


def curves(views: Sequence[RunView], metrics: Sequence[str], *, x: str = "step", suffix: str = "") -> list[Series]:
    """A curve per run that has its metric. A run has one colour in all panels; dashes tell apart those that share
    one."""
    found = [
        series_of(view.rows, metric, label=f"{view.name}{suffix}", colour=colour_of(i), x=x, dashed=i >= len(COLOURS))
        for i, (view, metric) in enumerate(zip(views, metrics, strict=True))
    ]
    return [curve for curve in found if curve.x]
