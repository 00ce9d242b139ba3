"""``tether report``: the page of one training run, or of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tether.errors import ConfigError, RunError
from tether.report.page import paragraph, plot, samples, section, table, whole_page, write_page
from tether.report.panels import against_kl, held_out_points, panels_of, shown_metrics
from tether.report.plots import Panel, svg
from tether.report.quickstart import is_quickstart, quickstart_page
from tether.report.view import EVALUATED, RunView, Sample, read_runs
from tether.runtime.files import require_file, write_output

NONE = "–"
"""Stands for an option or a figure that a run does not have."""


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of some run directories to ``out``, or of one to its ``report.html``; gives the path.

    Raises :class:`ConfigError` where several runs have no ``out``, and :class:`RunError` where one is no run.
    """
    if out is not None:
        require_file(out)
    elif len(runs) > 1:
        named = ", ".join(map(str, runs))
        raise ConfigError(f"{len(runs)} runs make one page ({named})", hint="name the file to write with --out FILE")
    if len(runs) > 1:
        page = several_runs_page(runs)
    elif is_quickstart(runs[0]):
        page = quickstart_page(runs[0])
    else:
        page = one_run_page(runs[0])
    if out is not None:
        write_output(out, page)
        return out
    write_page(runs[0] / "report.html", page)
    return runs[0] / "report.html"


def one_run_page(path: Path) -> bytes:
    """Held-out evaluation, plots, samples and configuration, as far as the run has them."""
    view = RunView.read(path)
    sections = []
    if cells := evaluation_cells(view):
        sections.append(section("On held-out prompts", table(["model", *EVALUATED], cells)))
    if view.rows:
        plots = plot(svg(panels_of([view])), "Each figure is one row of metrics.jsonl per step.")
        sections.append(section("Over the steps", plots))
    else:
        sections.append(paragraph("The run has no metrics yet."))
    if view.samples:
        shown = sample_table(view.best_and_worst(8))
        sections.append(section("Samples of the last rollouts, best and worst by score", shown))
    options = [[name, str(value)] for name, value in view.config.items()]
    sections.append(section("Configuration", table(["option", "value"], options, text=True)))
    lead = f"{len(view.rows)} rows of metrics, from {view.name}"
    return whole_page(f"tether {view.command}", lead, *sections)


def several_runs_page(paths: Sequence[Path]) -> bytes:
    """Where the runs differ, where they ended, how they got there, and what their samples read like."""
    views = read_runs(paths)
    for path, view in zip(paths, views, strict=True):
        if view.command == "quickstart":
            raise RunError("a quickstart holds several runs", where=path, hint=f"name those in it, such as {path}/ppo")
    names = [view.name for view in views]
    options = differing_options(views)
    differ = table(["option", *names], options, text=True) if options else paragraph("All options are the same.")
    sections = [section("Options that differ", differ)]
    if cells := [[f"{view.name}: {model}", *rest] for view in views for model, *rest in evaluation_cells(view)]:
        sections.append(section("On held-out prompts", table(["run and model", *EVALUATED], cells)))
    if any(view.rows for view in views):
        sections.append(section("Last figures", table(["metric", *names], last_figures(views))))
    else:
        sections.append(paragraph("The runs have no metrics yet."))
    if panels := panels_of_several(views):
        caption = "Lines: one row of metrics.jsonl per step. Points: held-out prompts, with their 95% interval."
        sections.append(section("Over the steps", plot(svg(panels, one_legend=True), caption)))
    for view in views:
        if view.samples:
            title = f"Samples of {view.name}, best and worst of the last rollouts"
            sections.append(section(title, sample_table(view.best_and_worst(6))))
    return whole_page(f"tether: {len(views)} runs", ", ".join(names), *sections)


def evaluation_cells(view: RunView) -> list[list[str]]:
    """One row per model of the held-out evaluation: its name and :data:`EVALUATED`."""
    return [[model, *(f"{found[name]:.3f}" for name in EVALUATED)] for model, found in view.evaluation.items()]


def sample_table(shown: Sequence[Sample]) -> str:
    """Completions behind their prompts, labelled with their scores."""
    return samples([(f"{sample.score:+.2f}", sample.prompt, sample.completion) for sample in shown])


def differing_options(views: Sequence[RunView]) -> list[list[str]]:
    """One row per option that is not the same in all runs: its name, and its value in each. ``out`` is left out."""
    names = dict.fromkeys(name for view in views for name in view.config if name != "out")
    rows = [[name, *(str(view.config.get(name, NONE)) for view in views)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def last_figures(views: Sequence[RunView]) -> list[list[str]]:
    """One row per metric of the plots: its name, and its newest value in each run."""
    names = ["step", *(name for _, metrics in shown_metrics(views) for name in metrics)]
    return [[name, *(NONE if (last := view.last(name)) is None else f"{last:.4g}" for view in views)] for name in names]


def panels_of_several(views: Sequence[RunView]) -> list[Panel]:
    """Reward against KL, where a run has both, and the metrics over the steps."""
    frontier = against_kl(
        views,
        "reward",
        title="Reward against KL",
        x_label="KL to the reference, nats per completion",
        y_label="reward",
        held_out=held_out_points(views),
    )
    return [*([frontier] if frontier.series else []), *panels_of(views)]
