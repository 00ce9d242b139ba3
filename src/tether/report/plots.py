"""Plots as SVG text, to be embedded in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigError
from tether.untrusted import printable

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
    panels: Sequence[Panel], *, columns: int = 2, width: float = 9.0, height: float = 3.1, one_legend: bool = False
) -> Any:
    """A matplotlib figure of panels side by side, ``columns`` in a row, ``width`` inches wide and ``height`` per row.
    It belongs to no window, and no setting of matplotlib changes.

    Panels with several series have a legend each; ``one_legend`` puts one above all of them instead, where a label
    has the same colour everywhere. Raises :class:`ConfigError` where matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // columns))
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height * rows), layout="constrained")
        for place, panel in enumerate(panels, 1):
            _draw(fig.add_subplot(rows, columns, place), panel, legend=not one_legend)
        if one_legend:
            named: dict[str, Any] = {}
            for axis in fig.axes:
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                    named.setdefault(label, handle)
            fig.legend(named.values(), named.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return fig


def _draw(axis: Any, panel: Panel, *, legend: bool) -> None:
    """Draw ``panel`` into its axes, with a ``legend`` where there are several series."""
    from matplotlib.ticker import MaxNLocator

    for one in panel.series:
        style, label = "--" if one.dashed else "-", printable(one.label)
        if one.points:
            axis.errorbar(one.x, one.y, yerr=one.error, fmt="o", color=one.colour, label=label, capsize=3, zorder=3)
        else:
            marker = "o" if len(one.x) == 1 else None  # a line of one point is invisible
            axis.plot(one.x, one.y, style, color=one.colour, label=label, linewidth=1.6, marker=marker)
    _begin(axis, panel)
    if panel.x_label == STEP:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    # ticks are made when the figure is rendered, which may be outside of STYLE
    axis.tick_params(labelsize=STYLE["font.size"], grid_alpha=STYLE["grid.alpha"])
    axis.set(title=printable(panel.title), xlabel=panel.x_label, ylabel=panel.y_label)
    if len(panel.series) > 1 and legend:
        axis.legend(fontsize=8)


def _begin(axis: Any, panel: Panel) -> None:
    """Begin the axes of ``panel`` where it says, or at the lowest value where that is lower."""
    xs, ys = ([value for one in panel.series for value in getattr(one, name)] for name in "xy")
    if panel.x_from is not None and xs and min(xs) >= panel.x_from:
        axis.set_xlim(left=panel.x_from - 0.02 * (max(xs) - panel.x_from))
    if panel.y_from is not None and ys and min(ys) >= panel.y_from:
        axis.set_ylim(bottom=panel.y_from)


def svg(panels: Sequence[Panel], **size: Any) -> str:
    """The figure as an ``<svg>`` element."""
    fig, out = figure(panels, **size), io.StringIO()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        fig.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def series_of(
    rows: Sequence[Mapping[str, float]], name: str, *, label: str, colour: str, x: str = "step", **style: Any
) -> Series:
    """A column of metrics over another one, from the rows that hold both."""
    held = [row for row in rows if name in row and x in row]
    return Series(label=label, x=[row[x] for row in held], y=[row[name] for row in held], colour=colour, **style)
