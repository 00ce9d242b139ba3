"""``tether report``: the page of one training run, or of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tether.errors import ConfigError
from tether.report.comparison import NONE, as_written, compare, distinct_figures, held_out_mean, standing
from tether.report.held_out import SCORE, Candidate, read_candidates, run_candidate
from tether.report.page import bullets, paragraph, plot, samples, section, table, whole_page, write_page
from tether.report.panels import panels_of
from tether.report.plots import svg
from tether.report.quickstart import is_quickstart, quickstart_page
from tether.report.reward_model import reward_model_sections
from tether.report.several import comparison_page, first_completions, sample_table
from tether.report.verdict import called, headline, notes, percent, plus_minus, verdicts
from tether.report.view import EVALUATED, RunView, reading
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
    sections = held_out_sections(one, view)
    if view.command == "reward":
        sections += reward_model_sections(path, view)
    if view.rows:
        plots = plot(svg(panels_of([view])), "Each figure is one row of metrics.jsonl per step.")
        sections.append(section("Over the steps", plots))
    else:
        sections.append(paragraph("The run has no metrics yet."))
    if view.samples:
        shown = sample_table(view.best_and_worst(8))
        sections.append(section("Samples of the last rollouts, best and worst by score", shown))
    options = [[name, as_written(value)] for name, value in view.config.items()]
    sections.append(section("Configuration", table(["option", "value"], options, text=True)))
    lead = f"{len(view.rows)} rows of metrics, from {view.name}"
    return whole_page(f"tether {view.command}", lead, *sections)


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
        models = [("policy", one.policy), ("reference", one.reference)]
        if rows := first_completions(models, SCORE):
            sections.append(section("The first completions of the first held-out prompts", samples(rows)))
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
