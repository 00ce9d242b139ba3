"""How rewards, lengths and KL are distributed, at the begin of a run and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tether.report.completions import Sample
from tether.report.plots import COLOURS, Panel, Series

BINS = 24
FIGURES: Sequence[tuple[str, Callable[[Sample], float | None]]] = (
    ("Reward", lambda one: one.score),
    ("Length, tokens", lambda one: float(one.length)),
    ("KL to the reference, nats", lambda one: one.kl),
)


def distribution_panels(first: Sequence[Sample], last: Sequence[Sample], names: tuple[str, str]) -> list[Panel]:
    """A panel per figure, with the completions of the first rollout file beside those of the last."""
    panels = []
    for title, figure in FIGURES:
        groups = [[value for one in group if (value := figure(one)) is not None] for group in (first, last)]
        known = [*groups[0], *groups[1]]
        if len(set(known)) < 2:
            continue
        low, high = min(known), max(known)
        curves = [
            histogram(group, low, high, label=name, colour=COLOURS[i])
            for i, (group, name) in enumerate(zip(groups, names, strict=True))
            if group
        ]
        panels.append(Panel(title=title, x_label="", y_label="share of completions", series=curves, y_from=0.0))
    return panels


def histogram(values: Sequence[float], low: float, high: float, *, label: str, colour: str) -> Series:
    """The share of ``values`` in each of :data:`BINS` bins from ``low`` to ``high``, and none beyond them.

    >>> drawn = histogram([0.0, 1.0, 24.0, 24.0], 0.0, 24.0, label="a", colour="k")
    >>> [share for share in drawn.y if share], len(drawn.x), drawn.x[:3]
    ([0.25, 0.25, 0.5], 26, [-0.5, 0.5, 1.5])
    """
    width = (high - low) / BINS
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / width))] += 1
    middles = [low + (i - 0.5) * width for i in range(BINS + 2)]
    shares = [0.0, *(count / len(values) for count in counts), 0.0]
    return Series(label=label, x=middles, y=shares, colour=colour, bars=True)
