"""``tether report DIR``: the page of one training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tether.report.page import paragraph, plot, samples, section, table, write_page
from tether.report.plots import COLOURS, Panel, series_of, svg
from tether.runtime.directory import CONFIG, read_metrics
from tether.types import Metrics

PANELS = (
    ("Reward", ("reward", "reward/selected")),
    ("KL to the reference, nats a completion", ("kl",)),
    ("Loss", ("loss", "loss/policy", "loss/value", "eval/loss")),
    ("Accuracy", ("accuracy", "eval/accuracy")),
    ("Entropy, nats a token", ("entropy",)),
    ("Completion length, tokens", ("completions/mean_length",)),
    ("Gradient norm", ("grad_norm",)),
    ("Sampler and trainer log-probs, gap in nats", ("sampling/logprob_gap_mean", "sampling/logprob_gap_max")),
    ("Seconds a step", ("step_time",)),
)
"""Title and metrics of each plot; one whose metrics a run does not have is left out."""


def panels_of(rows: list[Metrics]) -> list[Panel]:
    """The plots that these metrics can fill, the parts of the reward included."""
    parts = sorted({name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")})
    wanted = [*PANELS[:1], *([("Parts of the reward", tuple(parts))] if parts else []), *PANELS[1:]]
    panels = []
    for title, names in wanted:
        present = [name for name in names if any(name in row for row in rows)]
        if present:
            series = [
                series_of(rows, name, label=name, colour=COLOURS[i % len(COLOURS)]) for i, name in enumerate(present)
            ]
            panels.append(Panel(title=title, x_label="step", y_label="", series=series))
    return panels


def last_samples(path: Path, most: int = 8) -> list[tuple[str, str, str]]:
    """(score, prompt, completion) of the newest rollout file: its best and its worst by score."""
    files = sorted((path / "rollouts").glob("*.parquet"))
    if not files:
        return []
    import pyarrow.parquet

    rows = sorted(pyarrow.parquet.read_table(files[-1]).to_pylist(), key=lambda row: -row["score"])
    shown = rows if len(rows) <= most else [*rows[: most // 2], *rows[-(most // 2) :]]
    return [(f"{row['score']:+.2f}", row["prompt"], row["completion"]) for row in shown]


def run_report(path: Path) -> Path:
    """Write ``report.html`` into a run directory from what the run left there; gives its path."""
    rows = read_metrics(path)
    config: dict[str, Any] = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    summary_file = path / "summary.json"
    parts = []
    if summary_file.is_file():
        evaluation = json.loads(summary_file.read_text(encoding="utf-8")).get("evaluation") or {}
        if evaluation:
            names = ["reward", "reward_ci95", "kl", "win_rate", "mean_length", "distinct_2"]
            cells = [[who, *(f"{found[name]:.3f}" for name in names)] for who, found in evaluation.items()]
            parts.append(section("On held-out prompts", table(["model", *names], cells)))
    if rows:
        parts.append(
            section("Over the steps", plot(svg(panels_of(rows)), "Each figure is one row of metrics.jsonl a step."))
        )
    else:
        parts.append(paragraph("The run has no metrics yet."))
    if found := last_samples(path):
        parts.append(section("Samples of the last rollouts, best and worst by score", samples(found)))
    parts.append(
        section("Configuration", table(["option", "value"], [[k, str(v)] for k, v in config.items()], text=True))
    )
    command = config.get("command", "run")
    write_page(path / "report.html", f"tether {command}", f"{len(rows)} rows of metrics, from {path.name}", *parts)
    return path / "report.html"
