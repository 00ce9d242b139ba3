"""``tether report``: the page of one training run, or of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tether.errors import ConfigError
from tether.report.comparison import NONE, as_written, compare, distinct_figures, held_out_mean, standing
from tether.report.distributions import distribution_panels
from tether.report.files import reading
from tether.report.held_out import SCORE, Candidate, read_candidates, run_candidate
from tether.report.page import (
    alarms,
    bullets,
    folded,
    paragraph,
    plots,
    section,
    table,
    whole_page,
    write_page,
)
from tether.report.panels import panels_of
from tether.report.quickstart import is_quickstart, quickstart_page
from tether.report.reward_model import reward_model_sections
from tether.report.sampled import sample_section
from tether.report.several import comparison_page, first_completions, frontier
from tether.report.verdict import called, headline, notes, percent, plus_minus, verdicts
from tether.report.view import EVALUATED, RunView
from tether.runtime.directory import SUMMARY
from tether.runtime.files import require_file, write_output


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
        candidates = read_candidates(runs)
        page = comparison_page(candidates, compare(candidates))
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
    one = run_candidate(path, path.absolute().name)
    view = one.view
    assert view is not None
    sections = [section("Alarms", alarms(view.alarms))] if view.alarms else []
    sections += held_out_sections(one, view)
    if view.command == "reward":
        sections += reward_model_sections(path, view)
    sections += distance_sections(one)
    if view.rows:
        curves = plots(panels_of([view]), "Each figure is one row of metrics.jsonl per step. Dotted lines: alarms.")
        sections.append(section("Over the steps", curves))
    else:
        sections.append(paragraph("The run has no metrics yet."))
    if view.samples:
        sections += rollout_sections(path, view)
    options = [[name, as_written(value)] for name, value in view.config.items()]
    sections.append(folded("Configuration", table(["option", "value"], options, text=True)))
    lead = f"{len(view.rows)} rows of metrics, from {view.name}"
    return whole_page(f"tether {view.command}", lead, *sections)


def distance_sections(one: Candidate) -> list[str]:
    """Each reward over the KL that it cost, in training and on held-out prompts."""
    panels = [panel for figure in distinct_figures([one]) if (panel := frontier([one], figure)).series]
    if not panels:
        return []
    caption = "Lines: samples during training. Points: held-out prompts, with their 95% interval."
    return [section("At what distance from the reference", plots(panels, caption))]


SHOWN_SAMPLES = 48
"""Completions of the last rollouts on the page, at most."""


def rollout_sections(path: Path, view: RunView) -> list[str]:
    """How the first and the last rollouts are distributed, and the completions of the last."""
    found, first, last = [], view.first_samples, view.samples
    names = tuple(f"step {group[0].row.get('step', '?')}" if group else "" for group in (first, last))
    if drawn := distribution_panels(first, last, (names[0], names[1])):
        found.append(section("Completions of the first and the last rollouts", plots(drawn, "Shares of completions.")))
    chosen = view.best_and_worst(SHOWN_SAMPLES)
    said = "All of them." if len(chosen) == len(last) else f"The best and the worst of {len(last)} by reward."
    phrases = [alarm.phrase for _, alarm in view.alarms if alarm.phrase]
    shown = sample_section(path, chosen, "samples", phrases=phrases)
    how = paragraph(f"{said} A click on the title of a column sorts by it.")
    found.append(section("Samples of the last rollouts", how, shown))
    return found


def held_out_sections(one: Candidate, view: RunView) -> list[str]:
    """What the policy in ``model/`` gained over its reference by each reward, the judges included; which step it is of;
    and samples of both."""
    parts = []
    if cells := evaluation_cells(view):
        parts.append(table(["model", *EVALUATED], cells))
    if one.policy is not None and one.reference is not None:
        parts.append(table(JUDGED, [judged_cells(one, figure) for figure in distinct_figures([one])]))
        found = compare([one])
        parts.append(bullets([f"{headline(found, [])} {' '.join(verdicts(found))}", *notes(found)]))
    sections = [section("On held-out prompts", *parts)] if parts else []
    if view.summary and view.command != "reward" and (parts or view.summary.get("best")):
        sections.append(section("Which weights were kept", paragraph(step_of_the_model(view))))
    if one.policy is not None and one.reference is not None:
        models = [("before: reference", one.reference), ("after: policy", one.policy)]
        if shown := first_completions(models, SCORE):
            sections.append(section("The first completions of the first held-out prompts", shown))
    return sections


JUDGED = ("by", "policy", "reference", "policy - reference", "wins")


def judged_cells(one: Candidate, figure: str) -> list[str]:
    """The row of one reward: the means of both models, and their paired difference, with 95% intervals over prompts."""
    assert one.reference is not None
    found = standing(one, figure)
    own, theirs, change = found.reward, held_out_mean(one.reference, figure), found.against_reference
    trained = "" if figure in one.trained_on else " (not trained on)"
    return [
        f"{called(figure)}{trained}",
        NONE if own is None else plus_minus(own),
        NONE if theirs is None else plus_minus(theirs),
        NONE if change is None else plus_minus(change, sign=True),
        NONE if found.wins is None else percent(found.wins),
    ]


def step_of_the_model(view: RunView) -> str:
    """Which step's weights are in ``model/`` of a finished run."""
    best = view.summary.get("best")
    if not best:
        return "model/ has the weights of the last step."
    metric = str(view.config.get("keep_best"))
    which = "lowest" if metric.startswith("-") else "highest"
    with reading(Path(SUMMARY)):
        value, step = float(best["value"]), int(best["step"])
    return f"model/ has the weights of step {step}, chosen by the {which} {metric.removeprefix('-')} ({value:.3g})."


def evaluation_cells(view: RunView) -> list[list[str]]:
    """One row per model of the held-out evaluation: its name and :data:`EVALUATED`."""
    return [[model, *(f"{found[name]:.3f}" for name in EVALUATED)] for model, found in view.evaluation.items()]
