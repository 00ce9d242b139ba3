"""The figure of a maze: values over its cells, exact and the critic's, and the way that the policy takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.report.plots import STYLE, require_matplotlib


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A maze, and what is drawn into it. Cells are (row, column)."""

    title: str
    size: int
    walls: Sequence[tuple[int, int]]
    values: Mapping[tuple[int, int], float]
    path: Sequence[tuple[int, int]]
    goal: tuple[int, int]


def maze_figure(columns: Sequence[Sequence[Drawn]], path: Path) -> None:
    """Write a figure with a column of mazes for each of ``columns``, all mazes of one in the same colours. Raises
    :class:`ConfigError` where matplotlib is not installed."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    height = max(map(len, columns))
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(2.7 * len(columns), 2.7 * height), layout="constrained")
        for j, column in enumerate(columns):
            lowest = min(value for one in column for value in one.values.values())
            for i, one in enumerate(column):
                _draw(fig.add_subplot(height, len(columns), i * len(columns) + j + 1), one, lowest)
        fig.savefig(path, dpi=150)


def _draw(axis: Any, one: Drawn, lowest: float) -> None:
    rows = [[one.values.get((i, j), float("nan")) for j in range(one.size)] for i in range(one.size)]
    axis.imshow(rows, cmap="viridis", vmin=lowest, vmax=0.0)
    for i, j in one.walls:
        axis.add_patch(_square(j, i))
    for (i, j), value in one.values.items():
        bright = value > 0.4 * lowest
        axis.text(
            j, i + 0.32, f"{value:.1f}", ha="center", va="center", fontsize=7, color="black" if bright else "white"
        )
    axis.plot([j for _, j in one.path], [i for i, _ in one.path], color="#d55e00", linewidth=2)
    start, goal = one.path[0], one.goal
    axis.plot([start[1]], [start[0]], "o", color="#d55e00", markersize=7)
    axis.plot([goal[1]], [goal[0]], "*", color="#d55e00", markersize=12)
    axis.set(title=one.title, xticks=[], yticks=[])
    axis.grid(visible=False)


def _square(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, color="#333333")
