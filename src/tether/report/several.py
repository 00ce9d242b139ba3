"""The page of several runs: which is better, how they got there, and what they write."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tether.report.comparison import NONE, Comparison, differing_options, distinct_figures, kl_of, reward_of
from tether.report.held_out import Candidate, HeldOut
from tether.report.page import bullets, paragraph, plots, section, side_by_side, table, whole_page
from tether.report.panels import against_kl, colour_of, held_out_point, panels_of, paths_over_kl, shown_metrics
from tether.report.plots import Panel
from tether.report.sampled import sample_section
from tether.report.verdict import PAIRS, STANDINGS, called, notes, pair_cells, standing_cells, verdicts
from tether.report.view import RunView

SHOWN_PROMPTS, SHOWN_SAMPLES = 4, 16
"""Held-out prompts whose completions the page shows, and completions of the last rollouts of each run."""


def comparison_page(candidates: Sequence[Candidate], found: Comparison) -> bytes:
    """The verdict and its tables, the runs' options, how they got there, and what their samples read like."""
    views = [one.view for one in candidates if one.view is not None]
    names = [one.name for one in candidates]
    sections = [
        *result_sections(candidates, found),
        options_section(views),
        *path_sections(views),
        *sample_sections(candidates, views, found),
    ]
    return whole_page(f"tether: {len(names)} {'run' if len(names) == 1 else 'runs'}", ", ".join(names), *sections)


def result_sections(candidates: Sequence[Candidate], found: Comparison) -> list[str]:
    """What the policies are worth, where any is known to be worth something."""
    if all(one.reward is None and one.kl is None for one in found.standings):
        return []
    name = called(found.figure)
    watched = "" if found.trained_on else ", which none of them was trained on"
    parts = [paragraph(f"Compared by {name}{watched}."), bullets(verdicts(found))]
    parts.append(table(["run", name, *STANDINGS[1:]], [standing_cells(one) for one in found.standings]))
    if found.pairs:
        parts.append(table(PAIRS, [pair_cells(one) for one in found.pairs], left=2))
    sections = [section("Which is better", *parts, bullets(notes(found)))]
    panels = [frontier(candidates, figure) for figure in frontier_figures(candidates, found)]
    if panels := [panel for panel in panels if panel.series]:
        caption = "Lines: samples during training. Points: held-out prompts, with their 95% interval."
        warned = [paragraph(text) for text in rewards_differ(candidates, found.figure)]
        drawn = plots(panels, caption, one_legend=True)
        sections.append(section("At what distance from the reference", *warned, drawn))
    return sections


def frontier_figures(candidates: Sequence[Candidate], found: Comparison) -> list[str]:
    """What is drawn over KL: the figure of the comparison, and every other one that several have."""
    others = [name for name in distinct_figures(candidates) if name != found.figure]
    return [found.figure, *(name for name in others if sum(one.has(name) for one in candidates) > 1)]


def frontier(candidates: Sequence[Candidate], figure: str) -> Panel:
    """One figure over the KL that it cost. A run has the colour that it has over the steps."""
    trained = [(one.view, one.metrics.get(figure, "")) for one in candidates if one.view is not None]
    paths = paths_over_kl([view for view, _ in trained], [metric for _, metric in trained], suffix=", training")
    ordered = sorted(candidates, key=lambda one: one.view is None)
    points = []
    for number, one in enumerate(ordered):
        source, reward = reward_of(one, figure)
        kl = kl_of(one)
        if source.startswith("held-out") and reward is not None and kl is not None:
            half = reward.half_width if math.isfinite(reward.half_width) else None
            points.append(held_out_point(one.name, colour_of(number), kl=kl, reward=reward.value, ci95=half))
    return against_kl(
        paths,
        points,
        title=f"{called(figure)} against KL",
        x_label="KL to the reference, nats per completion",
        y_label=called(figure),
    )


def rewards_differ(candidates: Sequence[Candidate], figure: str) -> list[str]:
    """A warning where one axis holds rewards of different things, and one where it holds KL to different references."""
    known = [one for one in candidates if one.has(figure)]
    said = []
    if len({one.rewards[figure] for one in known}) > 1:
        meant = "; ".join(f"{one.name}: {one.rewards[figure] or NONE}" for one in known)
        said.append(
            f"Careful: {called(figure)} is not the same in all runs, so its values are not comparable. {meant}."
        )
    if len({one.base for one in known}) > 1:
        said.append("Careful: the runs have different references, so their KL is not comparable.")
    return said


def options_section(views: Sequence[RunView]) -> str:
    """The options that are not the same in all runs."""
    options = differing_options(views)
    header = ["option", *(view.name for view in views)]
    return section(
        "Options that differ",
        table(header, options, text=True) if options else paragraph("All options are the same."),
    )


def path_sections(views: Sequence[RunView]) -> list[str]:
    """Metrics over the steps, and their last values."""
    if not any(view.rows for view in views):
        return [paragraph("The runs have no metrics yet.")]
    names = [view.name for view in views]
    panels = panels_of(views) if len(views) > 1 else []
    drawn = [section("Over the steps", plots(panels, "One row of metrics.jsonl per step.", one_legend=True))]
    return [*(drawn if panels else []), section("Last figures", table(["metric", *names], last_figures(views)))]


def last_figures(views: Sequence[RunView]) -> list[list[str]]:
    """One row per metric of the plots: its name, and its newest value in each run."""
    names = ["step", *(name for _, metrics in shown_metrics(views) for name in metrics)]
    return [[name, *(NONE if (last := view.last(name)) is None else f"{last:.4g}" for view in views)] for name in names]


def sample_sections(candidates: Sequence[Candidate], views: Sequence[RunView], found: Comparison) -> list[str]:
    """What the policies write: the first completions of the first held-out prompts, and of each run the best and worst
    of its last rollouts."""
    sections = []
    models = [(one.name, one.policy) for one in candidates if one.policy is not None and one.has(found.figure)]
    if shown := first_completions(models, found.figure):
        sections.append(section("The first completions of the first held-out prompts", shown))
    for number, view in enumerate(views):
        if view.samples:
            table_of_samples = sample_section(view.path, view.best_and_worst(SHOWN_SAMPLES), f"samples{number}")
            sections.append(section(f"Samples of {view.name}, best and worst of the last rollouts", table_of_samples))
    return sections


def first_completions(models: Sequence[tuple[str, HeldOut]], figure: str) -> str:
    """The first completions of the labelled ``models``, with their scores, side by side, for the first prompts that all
    of them have; "" where there is none."""
    if not models:
        return ""
    shared = [prompt for prompt in models[0][1].texts if all(prompt in model.texts for _, model in models)]
    found = []
    for prompt in shared[:SHOWN_PROMPTS]:
        answers = []
        for label, model in models:
            score = model.scores[figure][prompt][0]
            answers.append((label if score is None else f"{label} ({score:+.2f})", model.texts[prompt][0]))
        found.append(side_by_side(prompt, answers))
    return "".join(found)
