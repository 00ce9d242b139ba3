"""Plots as SVG text, to be embedded in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tether.errors import ConfigError
from tether.untrusted import printable, shortened

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f5f5f")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

STEP = "step"
"""The label of an axis of steps, whose ticks are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of points; ``x`` and ``y`` have one length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dashed: bool = False
    points: bool = False
    bars: bool = False
    """The outline of a histogram; ``x`` has the middles of its bins."""
    error: Sequence[float] | None = None
    """Half-widths of error bars, for points."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_from: float | None = None
    """Where the axis begins, unless a value is lower; by default a little below the lowest."""
    y_from: float | None = None
    marks: Sequence[float] = ()
    """Where on the x axis something happened."""


LONGEST = {"title": 64, "xlabel": 64, "ylabel": 40, "label": 40}
"""Characters of a text that fit into a panel."""
MARK = "#b3261e"
"""The colour of marks."""
STYLE: Any = {
    "svg.hashsalt": "tether",  # the same figures give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # the name of a reward may hold a $
}
"""Settings of matplotlib for these figures alone."""


def require_matplotlib() -> None:
    """Raise :class:`ConfigError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("a figure needs the extra: pip install 'tether-rlhf[report]'") from None


def figure(
    panels: Sequence[Panel], *, columns: int = 2, width: float = 9.0, height: float = 3.1, legend: bool = True
) -> Any:
    """A matplotlib figure of panels side by side, ``columns`` in a row, ``width`` inches wide and ``height`` per row.
    It belongs to no window, and no setting of matplotlib changes.

    Panels with several series have a legend each, unless ``legend`` is off. Raises :class:`ConfigError` where
    matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // columns))
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height * rows), layout="constrained")
        for place, panel in enumerate(panels, 1):
            _draw(fig.add_subplot(rows, columns, place), panel, legend=legend)
    return fig


def _draw(axis: Any, panel: Panel, *, legend: bool) -> None:
    """Draw ``panel`` into its axes, with a ``legend`` where there are several series."""
    from matplotlib.ticker import MaxNLocator

    for one in panel.series:
        style, label = "--" if one.dashed else "-", shortened(printable(one.label), LONGEST["label"])
        if one.bars:
            axis.step(one.x, one.y, style, where="mid", color=one.colour, label=label, linewidth=1.4)
        elif one.points:
            axis.errorbar(one.x, one.y, yerr=one.error, fmt="o", color=one.colour, label=label, capsize=3, zorder=3)
        else:
            marker = "o" if len(one.x) == 1 else None  # a line of one point is invisible
            axis.plot(one.x, one.y, style, color=one.colour, label=label, linewidth=1.6, marker=marker)
    for mark in panel.marks:
        axis.axvline(mark, color=MARK, linestyle=":", linewidth=1.2)
    _begin(axis, panel)
    if panel.x_label == STEP:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    titles = {"title": panel.title, "xlabel": panel.x_label, "ylabel": panel.y_label}
    # ticks are made when the figure is rendered, which may be outside of STYLE
    axis.tick_params(labelsize=STYLE["font.size"], grid_alpha=STYLE["grid.alpha"])
    axis.set(**{name: shortened(printable(text), LONGEST[name]) for name, text in titles.items()})
    if len(panel.series) > 1 and legend:
        axis.legend(fontsize=8)


def _begin(axis: Any, panel: Panel) -> None:
    """Begin the axes of ``panel`` where it says, or at the lowest value where that is lower."""
    xs, ys = ([value for one in panel.series for value in getattr(one, name)] for name in "xy")
    if panel.x_from is not None and xs and min(xs) >= panel.x_from:
        axis.set_xlim(left=panel.x_from - 0.02 * (max(xs) - panel.x_from))
    if panel.y_from is not None and ys and min(ys) >= panel.y_from:
        axis.set_ylim(bottom=panel.y_from)


def svg(panel: Panel, *, legend: bool = True) -> str:
    """The panel as an ``<svg>`` element, whose colours are those of the page around it: its text has the page's colour,
    and the palette is ``--c0``, ``--c1``, ..."""
    fig, out = figure([panel], columns=1, width=4.6, legend=legend), io.StringIO()
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[a-z0-9.]+_[0-9]+"', "", text)  # nothing refers to them, and all figures have the same
    text = re.sub(r"(?<=fill: |roke: )#[0-9a-f]{6}", lambda found: ON_PAGE.get(found[0], found[0]), text)
    named = f' role="img" aria-label="{escape(printable(panel.title))}" fill="currentColor"'
    return text.replace("<svg", "<svg" + named, 1)


ON_PAGE = {
    "#000000": "currentColor",
    MARK: "var(--alarm)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)},
}
"""A colour in a figure to what it is on a page."""


def series_of(
    rows: Sequence[Mapping[str, float]], name: str, *, label: str, colour: str, x: str = "step", **style: Any
) -> Series:
    """A column of metrics over another one, from the rows that hold both."""
    held = [row for row in rows if name in row and x in row]
    return Series(label=label, x=[row[x] for row in held], y=[row[name] for row in held], colour=colour, **style)
