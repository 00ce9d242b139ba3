"""What the page of a reward-model run shows besides its curves: how far its preferences can be believed, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.algorithms import pair_breakdown
from tether.algorithms.pair_evaluation import Evaluation, accuracy_interval, assess, calibration, sign_share
from tether.report.files import reading
from tether.report.page import paragraph, plots, section, table
from tether.report.plots import COLOURS, STEP, Panel, Series, series_of
from tether.report.view import RunView
from tether.runtime.directory import DATA, SUMMARY
from tether.runtime.judged_pairs import TEST_PAIRS, JudgedPair, read_judged
from tether.statistics import Estimate, mean_interval
from tether.untrusted import shortened

WORST, LONGEST_TEXT = 10, 700
"""Pairs that are shown, and characters of each of their texts."""
FEW = 200
"""Values below which a histogram has half as many bins."""
DETECTOR = 0.9
"""Share of the pairs in which a length detector prefers the longer side, or the shorter one, at least."""
BLUE, ORANGE, GREEN, GREY = *COLOURS[:3], COLOURS[6]


def reward_model_sections(path: Path, view: RunView) -> list[str]:
    """The sections of the run in ``path``, as far as it has come. Raises :class:`RunError` that names a file which
    holds what tether does not write."""
    with reading(path / TEST_PAIRS):
        pairs = read_judged(path)
    found = []
    if view.summary:
        with reading(path / SUMMARY):
            found.append(section("How good it is", *_judgement(view.summary, pairs)))
            found.append(_choice(view))
    if pairs:
        found.append(section("The pairs it gets most wrong", worst_pairs(pairs)))
    if (path / DATA).is_file():
        with reading(path / DATA):
            found.append(section("Rows of the data", row_counts(json.loads((path / DATA).read_text("utf-8")))))
    return found


def _judgement(summary: Any, pairs: Sequence[JudgedPair]) -> list[str]:
    """The figures of the summary and, from the test pairs, what is behind them."""
    low, high = summary["accuracy_ci95"]
    rows = [
        [
            "pairs",
            f"{summary['pairs']} to learn, {summary['stopping_pairs']} to stop by, {summary['test_pairs']} to test",
        ],
        [f"accuracy on the {summary['judged_on']} pairs", f"{summary['accuracy']:.1%}"],
        ["its 95% interval (Wilson)", f"{low:.1%} to {high:.1%}"],
        ["prompts of these pairs", str(summary["judged_prompts"])],
        ["accuracy of 'the longer side wins' on them", f"{summary['longer_wins']:.1%}"],
        ["prefers the longer side in", f"{summary['prefers_longer']:.1%} of those of different length"],
        ["log loss, nats per pair (guessing: 0.693)", f"{summary['log_loss']:.3f}"],
        ["calibration error", f"{summary['calibration_error']:.3f}"],
    ]
    figures = table(["", ""], rows, text=True)
    if not pairs:
        note = "There are no test pairs: these figures, on the pairs that the weights were chosen by, are too good."
        return [figures, paragraph(note)]
    drawn = plots([reliability(pairs), confidences(pairs), scores(pairs), margins(pairs)], CAPTION)
    by_length = plots([length_panel(pairs)], LENGTH_CAPTION)
    return [figures, paragraph(length_verdict(pairs)), drawn, reliability_table(pairs), by_length, length_table(pairs)]


CAPTION = (
    "On the test pairs. Top: the share of pairs ranked right against the confidence in the preferred side, "
    "sigmoid(|margin|), with 95% intervals, and how many pairs have which confidence. On the dashed line a model is "
    "right as often as it is sure to be; below it, it is overconfident. Bottom: raw scores of both sides, and the "
    "margin, chosen minus rejected; pairs left of 0 are ranked wrong."
)
LENGTH_CAPTION = (
    "Accuracy by how many tokens longer the chosen side is, with 95% intervals. A model that reads more than the "
    "length is right about as often on the left as on the right."
)


def evaluation_of_rows(pairs: Sequence[JudgedPair]) -> Evaluation:
    """The evaluation of judged pairs."""
    return assess(_margins(pairs), longer_by=_longer_by(pairs), prompts=[pair.prompt_index for pair in pairs])


def length_verdict(pairs: Sequence[JudgedPair]) -> str:
    """In words: what the better of the rules "the longer side wins" and "the shorter side wins" achieves on the same
    pairs, whether the model does better, and whether it is a length detector.

    It is one if it prefers the longer side, or the shorter one, in at least nine of ten pairs of different length, and
    is not better than the rule.
    """
    found = evaluation_of_rows(pairs)
    rule, share = more_frequent_side(found.longer_wins)
    side, prefers = more_frequent_side(found.prefers_longer)
    better = against_rule(pairs, longer=rule == "longer")
    said = (
        f"The rule that the {rule} side wins is right on {share:.1%} of these pairs, the model on "
        f"{found.accuracy:.1%}: a difference of {100 * better.value:+.1f} ± {100 * better.half_width:.1f} points (95%)"
    )
    if better.low > 0:
        return f"{said}. The model is better than the rule, and prefers the {side} side in {prefers:.0%} of the pairs."
    if prefers >= DETECTOR:
        return (
            f"{said}. The model is a length detector: it prefers the {side} side in {prefers:.0%} of the pairs of "
            "different length. A policy trained with it will learn length."
        )
    worse = "worse than the rule" if better.high < 0 else "not shown to be better than the rule"
    return f"{said}. The model is {worse}; it prefers the {side} side in {prefers:.0%} of the pairs."


def more_frequent_side(longer: float) -> tuple[str, float]:
    """``longer`` or ``shorter``, whichever has the larger share, and its share, from that of the ``longer`` side."""
    return ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)


def against_rule(pairs: Sequence[JudgedPair], *, longer: bool) -> Estimate:
    """By how much the accuracy is higher than that of the rule that the ``longer`` side wins, or else the shorter one,
    with an interval over prompts."""
    by_rule = sign_share(_longer_by(pairs) if longer else -_longer_by(pairs))
    difference = (sign_share(_margins(pairs)) - by_rule).tolist()
    totals: dict[int, float] = {}
    for pair, value in zip(pairs, difference, strict=True):
        totals[pair.prompt_index] = totals.get(pair.prompt_index, 0.0) + value
    return mean_interval([total * len(totals) / len(pairs) for total in totals.values()])


def length_bins(pairs: Sequence[JudgedPair]) -> list[tuple[str, list[JudgedPair]]]:
    """The pairs by how much longer the chosen side is (:func:`tether.algorithms.pair_breakdown.length_bins`)."""
    bins = pair_breakdown.length_bins([pair.chosen_length - pair.rejected_length for pair in pairs])
    return [(name, [pairs[i] for i in inside]) for name, inside in bins]


def length_panel(pairs: Sequence[JudgedPair]) -> Panel:
    """Accuracy per bin of :func:`length_bins`, at the bin's mean difference."""
    points = [
        (sum(one.chosen_length - one.rejected_length for one in inside) / len(inside), *_accuracy(inside))
        for _, inside in length_bins(pairs)
    ]
    ends = [points[0][0], points[-1][0]]
    return Panel(
        title="Accuracy by length",
        x_label="tokens by which the chosen side is longer, mean of the bin",
        y_label="accuracy",
        y_from=0.0,
        series=[
            Series(label="guessing", x=ends, y=[0.5, 0.5], colour=GREY, dashed=True),
            *_with_intervals(points, "model"),
        ],
    )


def length_table(pairs: Sequence[JudgedPair]) -> str:
    rows = []
    for name, inside in length_bins(pairs):
        accuracy, low, high = _accuracy(inside)
        rows.append([name, str(len(inside)), f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}"])
    return table(["chosen side, in tokens", "pairs", "accuracy", "95% interval"], rows)


def reliability(pairs: Sequence[JudgedPair]) -> Panel:
    """Accuracy against confidence: the reliability diagram."""
    points = [(c, a, *_interval(a, n)) for c, a, n in calibration(_margins(pairs))]
    return Panel(
        title="Calibration",
        x_label="confidence",
        y_label="accuracy",
        y_from=0.0,
        series=[
            Series(label="calibrated", x=[0.5, 1.0], y=[0.5, 1.0], colour=GREY, dashed=True),
            *_with_intervals(points, "model"),
        ],
    )


def reliability_table(pairs: Sequence[JudgedPair]) -> str:
    rows = []
    for confidence, accuracy, count in calibration(_margins(pairs)):
        low, high = _interval(accuracy, count)
        rows.append([f"{confidence:.1%}", str(count), f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}"])
    return table(["mean confidence of the bin", "pairs", "accuracy", "95% interval"], rows)


def confidences(pairs: Sequence[JudgedPair]) -> Panel:
    """How many pairs have which confidence."""
    values = _margins(pairs).abs().sigmoid()
    x, y = stairs(values, torch.linspace(0.5, 1.0, 11, dtype=torch.float64))
    series = [Series(label="pairs", x=x, y=y, colour=BLUE)]
    return Panel(title="Pairs by confidence", x_label="confidence", y_label="pairs", y_from=0.0, series=series)


def scores(pairs: Sequence[JudgedPair]) -> Panel:
    """Distributions of the scores of both sides."""
    sides = [("chosen", BLUE, [p.chosen_score for p in pairs]), ("rejected", ORANGE, [p.rejected_score for p in pairs])]
    edges = edges_of(torch.tensor([*sides[0][2], *sides[1][2]], dtype=torch.float64))
    drawn = []
    for label, colour, values in sides:
        x, y = stairs(torch.tensor(values, dtype=torch.float64), edges)
        drawn.append(Series(label=label, x=x, y=y, colour=colour))
    return Panel(title="Scores", x_label="raw score", y_label="pairs", y_from=0.0, series=drawn)


def margins(pairs: Sequence[JudgedPair]) -> Panel:
    """Distribution of the margin, with a line at 0."""
    values = _margins(pairs)
    x, y = stairs(values, edges_of(torch.cat([values, -values])))  # 0 is the edge in the middle
    zero = Series(label="equal scores", x=[0.0, 0.0], y=[0.0, max(y)], colour=GREY, dashed=True)
    series = [Series(label="pairs", x=x, y=y, colour=GREEN), zero]
    return Panel(title="Margins", x_label="chosen score - rejected score", y_label="pairs", y_from=0.0, series=series)


def edges_of(values: Tensor) -> Tensor:
    """The edges of equal bins that hold all values: 24 of them, 12 for fewer than :data:`FEW` values."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    return torch.linspace(low, high, 25 if len(values) >= FEW else 13, dtype=torch.float64)


def stairs(values: Tensor, edges: Tensor) -> tuple[list[float], list[float]]:
    """The outline of a histogram: x and y of its corners. A value on an inner edge is in the upper bin."""
    bins = len(edges) - 1
    counts = torch.bincount(torch.bucketize(values.double(), edges[1:-1], right=True), minlength=bins).tolist()
    x = [float(edge) for i in range(bins) for edge in (edges[i], edges[i + 1])]
    y = [float(count) for count in counts for _ in range(2)]
    return [x[0], *x, x[-1]], [0.0, *y, 0.0]


def _choice(view: RunView) -> str:
    """The figures by which training was stopped and the weights were chosen, with the step that was kept."""
    kept, panels = float(view.summary["best_step"]), []
    for title, metric in (("Accuracy on the stopping pairs", "eval/accuracy"), ("Log loss on them", "eval/loss")):
        curve = series_of(view.rows, metric, label=metric, colour=BLUE)
        if not curve.y:
            continue
        low, high = min(curve.y), max(curve.y)
        ends = [low, high] if low < high else [low - 0.05, high + 0.05]
        mark = Series(label="kept", x=[kept, kept], y=ends, colour=ORANGE, dashed=True)
        dots = Series(label="_evaluations", x=curve.x, y=curve.y, colour=BLUE, points=True)
        panels.append(Panel(title=title, x_label=STEP, y_label="", series=[curve, dots, mark]))
    said = paragraph(
        f"The weights of step {view.summary['best_step']} of {view.summary['steps']} were kept; training stopped: "
        f"{view.summary['stopped']}. On the {view.summary['stopping_pairs']} stopping pairs they were right on "
        f"{view.summary['stopping_accuracy']:.1%}, which is on average too high, because they were chosen by it."
    )
    drawn = plots(panels, "Evaluations, and the step that was kept.") if panels else ""
    return section("Which weights were kept", said, drawn)


def worst_pairs(pairs: Sequence[JudgedPair]) -> str:
    """The pairs with the most negative margins, with their texts; the middle of a long text is left out."""
    wrong = sorted((pair for pair in pairs if pair.margin < 0), key=lambda pair: pair.margin)[:WORST]
    if not wrong:
        return paragraph("None is ranked wrong.")
    rows = [
        [
            f"{pair.margin:.2f} ({pair.chosen_score:.2f}, {pair.rejected_score:.2f})",
            *(shortened(text, LONGEST_TEXT) for text in (pair.prompt, pair.chosen, pair.rejected)),
        ]
        for pair in wrong
    ]
    return table(["margin (scores)", "prompt", "chosen", "rejected, scored higher"], rows, text=True)


def row_counts(sources: Sequence[Any]) -> str:
    """Rows read and used of each source, and what was found in them."""
    rows = [
        [
            str(source["source"]),
            str(source["rows"]),
            str(source["kept"]),
            ", ".join(f"{kind} {found['count']}" for kind, found in source["findings"].items()) or "nothing",
        ]
        for source in sources
    ]
    return table(["source", "rows", "used", "found in them"], rows, text=True)


def _margins(pairs: Sequence[JudgedPair]) -> Tensor:
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)


def _longer_by(pairs: Sequence[JudgedPair]) -> Tensor:
    return torch.tensor([pair.chosen_length - pair.rejected_length for pair in pairs])


def _accuracy(pairs: Sequence[JudgedPair]) -> tuple[float, float, float]:
    """Accuracy and its interval."""
    right = sign_share(_margins(pairs))
    return float(right.mean()), *accuracy_interval(right.tolist(), [pair.prompt_index for pair in pairs])


def _interval(accuracy: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` pairs, as if their prompts differed."""
    return accuracy_interval([accuracy] * count, range(count))


def _with_intervals(points: Sequence[tuple[float, float, float, float]], label: str) -> list[Series]:
    """Points (x, y, low, high) with vertical lines from low to high; the legend names the points alone."""
    lines = [Series(label="_interval", x=[x, x], y=[low, high], colour=BLUE) for x, _, low, high in points]
    dots = Series(label=label, x=[p[0] for p in points], y=[p[1] for p in points], colour=BLUE, points=True)
    return [*lines, dots]
