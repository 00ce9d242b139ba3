"""The frontier: what runs earn by the reward they were trained on, and by one they were not, at each distance from the
reference; the curves through it, and where the second one peaks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tether.ops.frontier import Curve, Fit, fit_curve, peak_interval
from tether.report.panels import colour_of
from tether.report.plots import Panel, Series
from tether.statistics import LEVEL, t_quantile

PROXY = "proxy"
LAST = 5
"""Points whose mean stands for where a run ended."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy at a distance from the reference."""

    label: str
    """``step 3``, or ``best of 4``."""
    kl: float
    """Nats per completion."""
    kl_ci95: float | None = None
    rewards: Mapping[str, tuple[float, float]]
    """Mean and standard error of each: :data:`PROXY`, the total reward, and each part."""
    tokens: float | None = None
    """Tokens of all steps up to here."""
    seconds: float | None = None

    @property
    def d(self) -> float:
        """sqrt(KL); an estimate below 0 counts as 0."""
        return math.sqrt(max(0.0, self.kl))


@dataclass(frozen=True, kw_only=True)
class Line:
    """A run, or best of n, and its fits by reward."""

    name: str
    curve: Curve
    points: Sequence[Point]
    fits: Mapping[str, Fit] = field(default_factory=dict)

    def fitted(self, rewards: Sequence[str]) -> Line:
        """With the fits of these rewards, where there are points enough. A standard error below the median counts as
        the median, so that no few points decide because their rewards happen to be equal."""
        fits = {}
        for name in rewards:
            known = [point for point in self.points if name in point.rewards]
            d = torch.tensor([point.d for point in known], dtype=torch.float64)
            means = torch.tensor([point.rewards[name][0] for point in known], dtype=torch.float64)
            errors = torch.tensor([point.rewards[name][1] for point in known], dtype=torch.float64)
            try:
                least = max(float(errors.median()), 1e-9) if known else 1.0
                fits[name] = fit_curve(self.curve, d, means, errors.clamp(min=least).square())
            except ValueError:
                continue
        return Line(name=self.name, curve=self.curve, points=self.points, fits=fits)

    @property
    def farthest(self) -> float:
        return max(point.d for point in self.points)


def line_of_run(name: str, rows: Sequence[Mapping[str, float]], parts: Sequence[str], *, completions: int) -> Line:
    """The steps of a run, from its metrics; the standard errors are those of ``completions`` independent ones."""
    points, tokens, seconds = [], 0.0, 0.0
    for row in rows:
        tokens, seconds = tokens + row.get("num_tokens", 0.0), seconds + row.get("step_time", 0.0)
        if "kl" not in row or "reward" not in row:
            continue
        rewards = {PROXY: (row["reward"], row["reward_std"] / math.sqrt(completions))}
        for part in parts:
            if f"rewards/{part}/mean" in row:
                error = row[f"rewards/{part}/std"] / math.sqrt(completions)
                rewards[part] = row[f"rewards/{part}/mean"], error
        label = f"step {int(row['step'])}"
        points.append(Point(label=label, kl=row["kl"], rewards=rewards, tokens=tokens, seconds=seconds))
    return Line(name=name, curve="rl", points=points)


# ------------------------------------------------------------------------------------------------ what follows from it


def describe_fit(fit: Fit, farthest: float) -> dict[str, Any]:
    """Parameters with their 95% intervals, and the peak in nats with its interval; null where there is none."""
    half = [t_quantile((1 + LEVEL) / 2, fit.points - 3) * math.sqrt(float(fit.covariance[i, i])) for i in range(3)]
    peak, interval = fit.peak, peak_interval(fit)
    low, high = interval if interval is not None else (None, None)
    return {
        "curve": "c + d (a - b d)" if fit.curve == "best-of-n" else "c + d (a - b log d)",
        "c": fit.c,
        "c_ci95": half[0],
        "a": fit.a,
        "a_ci95": half[1],
        "b": fit.b,
        "b_ci95": half[2],
        "points": fit.points,
        "peak_kl": None if peak is None else peak**2,
        "peak_kl_low": None if low is None else low**2,
        "peak_kl_high": None if high is None or math.isinf(high) else high**2,
        "peak_within_data": peak is not None and peak <= farthest,
    }


def at_equal_kl(lines: Sequence[Line], reward: str) -> list[dict[str, Any]]:
    """The fitted reward of each line at distances that all of them reach, with 95% intervals."""
    fitted = [line for line in lines if reward in line.fits]
    if len(fitted) < 2:
        return []
    reach = min(line.farthest for line in fitted)
    return [
        {
            "kl": (share * reach) ** 2,
            **{
                line.name: {
                    "reward": line.fits[reward].at(share * reach),
                    "ci95": 1.96 * line.fits[reward].standard_error(share * reach),
                }
                for line in fitted
            },
        }
        for share in (0.25, 0.5, 0.75, 1.0)
    ]


def at_equal_compute(lines: Sequence[Line], reward: str) -> list[dict[str, Any]]:
    """The mean reward of the points up to the same number of sampled tokens: the :data:`LAST` before it."""
    counted = [line for line in lines if line.points and line.points[-1].tokens]
    if len(counted) < 2:
        return []
    least = min(line.points[-1].tokens or 0.0 for line in counted)
    found = []
    for line in counted:
        within = [p for p in line.points if (p.tokens or 0.0) <= least and reward in p.rewards][-LAST:]
        if within:
            mean, error = mean_of([point.rewards[reward] for point in within])
            found.append({"name": line.name, "tokens": within[-1].tokens, "reward": mean, "ci95": 1.96 * error})
    return found


def mean_of(rewards: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent means, and its standard error."""
    n = len(rewards)
    return sum(mean for mean, _ in rewards) / n, math.sqrt(sum(error**2 for _, error in rewards)) / n


def trade_offs(lines: Sequence[Line], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Where each run ended in all ``parts``, and whether it is on the Pareto front: no other is at least as high in all
    of them and higher in one."""
    ends = []
    for line in lines:
        last = [point for point in line.points if all(part in point.rewards for part in parts)][-LAST:]
        if last:
            ends.append((line.name, {part: mean_of([point.rewards[part] for point in last]) for part in parts}))

    def beaten(own: Mapping[str, tuple[float, float]]) -> bool:
        return any(
            all(other[part][0] >= own[part][0] for part in parts) and any(other[p][0] > own[p][0] for p in parts)
            for _, other in ends
        )

    return [
        {
            "name": name,
            "on_the_front": not beaten(found),
            **{part: {"reward": mean, "ci95": 1.96 * error} for part, (mean, error) in found.items()},
        }
        for name, found in ends
    ]


def as_data(lines: Sequence[Line], rewards: Sequence[str]) -> dict[str, Any]:
    """All of ``frontier.json``."""
    gold = rewards[-1]
    runs = [line for line in lines if line.curve == "rl"]
    parts = sorted({name for line in lines for point in line.points for name in point.rewards} - {PROXY})
    return {
        "rewards": list(rewards),
        "lines": [
            {
                "name": line.name,
                "points": [
                    {
                        "label": point.label,
                        "kl": point.kl,
                        "kl_ci95": point.kl_ci95,
                        "sqrt_kl": point.d,
                        "tokens": point.tokens,
                        "seconds": point.seconds,
                        **{
                            name: {"reward": mean, "ci95": 1.96 * error}
                            for name, (mean, error) in point.rewards.items()
                        },
                    }
                    for point in line.points
                ],
                "fits": {name: describe_fit(fit, line.farthest) for name, fit in line.fits.items()},
            }
            for line in lines
        ],
        "equal_kl": at_equal_kl(lines, gold),
        "equal_compute": at_equal_compute(lines, gold),
        "trade_offs": trade_offs(runs, parts) if len(runs) > 1 and len(parts) > 1 else [],
    }


def panels(lines: Sequence[Line], rewards: Sequence[str]) -> list[Panel]:
    """A panel per reward: points, fitted curves, and a mark at the peak of each fit that lies within the data."""
    found = []
    for reward in rewards:
        series, marks = [], []
        for number, line in enumerate(lines):
            known = [point for point in line.points if reward in point.rewards]
            colour = colour_of(number)
            ends = [1.96 * point.rewards[reward][1] for point in known]
            xs, ys = [point.d for point in known], [point.rewards[reward][0] for point in known]
            series.append(Series(label=line.name, x=xs, y=ys, colour=colour, points=True, error=ends))
            if (fit := line.fits.get(reward)) is not None:
                grid = [line.farthest * i / 60 for i in range(61)]
                label = f"{line.name}, fitted"
                series.append(Series(label=label, x=grid, y=[fit.at(d) for d in grid], colour=colour))
                if fit.peak is not None and fit.peak <= line.farthest:
                    marks.append(fit.peak)
        title = "Proxy: the reward trained on" if reward == PROXY else f"{reward}"
        label = "sqrt(KL to the reference), sqrt(nats)"
        found.append(Panel(title=title, x_label=label, y_label="mean reward", series=series, x_from=0.0, marks=marks))
    return found
