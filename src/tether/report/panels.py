"""The plots of one run and of several: metrics over steps, and reward against KL."""

from __future__ import annotations

from collections.abc import Sequence

from tether.report.plots import COLOURS, Panel, Series, series_of
from tether.report.view import RunView

REWARD = ("Reward", ("reward", "reward/selected"))
OTHERS = (
    ("KL to the reference, nats per completion", ("kl",)),
    ("Loss", ("loss", "loss/policy", "loss/value", "eval/loss")),
    ("Accuracy", ("accuracy", "eval/accuracy")),
    ("Entropy, nats per token", ("entropy",)),
    ("Completion length, tokens", ("completions/mean_length",)),
    ("Gradient norm", ("grad_norm",)),
    ("Sampler and trainer log-probs, gap in nats", ("sampling/logprob_gap_mean", "sampling/logprob_gap_max")),
    ("Seconds per step", ("step_time",)),
)
"""Title and metrics of each plot; one whose metrics a run does not have is left out."""


def shown_metrics(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """Title and metrics of the plots that these runs can fill, the parts of the reward included."""
    held = {name for view in views for row in view.rows for name in row}
    parts = sorted({name for view in views for name in view.reward_parts})
    groups = [(title, [name for name in names if name in held]) for title, names in (REWARD, *OTHERS)]
    return [(title, names) for title, names in [groups[0], ("Parts of the reward", parts), *groups[1:]] if names]


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
    return Panel(title=title, x_label="step", y_label="", series=series)


def over_steps(views: Sequence[RunView], metric: str, *, title: str) -> Panel:
    """One metric over the steps of several runs."""
    return Panel(title=title, x_label="step", y_label="", series=_curves(views, metric))


def against_kl(
    views: Sequence[RunView],
    metric: str,
    *,
    title: str,
    x_label: str,
    y_label: str,
    held_out: Sequence[Series],
    suffix: str = "",
) -> Panel:
    """A reward over the KL that it cost: the path of each run's training samples, labelled with its name and
    ``suffix``, and the points of :func:`held_out_point`."""
    paths = _curves(views, metric, x="kl", suffix=suffix)
    return Panel(title=title, x_label=x_label, y_label=y_label, series=[*paths, *held_out])


def held_out_point(label: str, colour: str, *, kl: float, reward: float, ci95: float | None = None) -> Series:
    """Where a policy stands on held-out prompts, with its 95% interval where that is known."""
    error = None if ci95 is None else [ci95]
    return Series(label=label, x=[kl], y=[reward], colour=colour, points=True, error=error)


def held_out_points(views: Sequence[RunView]) -> list[Series]:
    """The trained policy of each run that was evaluated, in the run's colour and with its name."""
    return [
        held_out_point(view.name, colour_of(i), kl=found["kl"], reward=found["reward"], ci95=found["reward_ci95"])
        for i, view in enumerate(views)
        if (found := view.evaluation.get("policy"))
    ]


def colour_of(i: int) -> str:
    """The colour of run or series ``i``; they repeat."""
    return COLOURS[i % len(COLOURS)]


def _curves(views: Sequence[RunView], metric: str, *, x: str = "step", suffix: str = "") -> list[Series]:
    """A curve per run with two points or more. A run has one colour in all panels; dashes tell apart those that share
    one."""
    curves = [
        series_of(
            view.rows,
            metric,
            label=f"{view.name}{suffix}",
            colour=colour_of(i),
            x=x,
            dashed=i >= len(COLOURS),
        )
        for i, view in enumerate(views)
    ]
    return [curve for curve in curves if len(curve.x) > 1]
