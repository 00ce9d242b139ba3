"""``tether report DIR``: the page of one training run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from tether.errors import RunError
from tether.report.page import paragraph, plot, samples, section, table, write_page
from tether.report.plots import COLOURS, Panel, series_of, svg
from tether.runtime.directory import CONFIG, read_metrics
from tether.types import Metrics
from tether.untrusted import read_flat_yaml

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


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What ``file`` holds that tether does not write there is a :class:`RunError` that names it."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise RunError(f"{file}: not as tether writes it ({type(error).__name__}: {error})") from error


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

    with reading(files[-1]), files[-1].open("rb") as file:  # pyarrow takes some names for addresses
        rows = sorted(pyarrow.parquet.read_table(file).to_pylist(), key=lambda row: -row["score"])
        shown = rows if len(rows) <= most else [*rows[: most // 2], *rows[-(most // 2) :]]
        return [(f"{row['score']:+.2f}", str(row["prompt"]), str(row["completion"])) for row in shown]


def held_out_table(file: Path) -> str:
    """The evaluation in a ``summary.json``, or nothing where the run had no held-out prompts."""
    with reading(file):
        evaluation = json.loads(file.read_text(encoding="utf-8")).get("evaluation") or {}
        names = ["reward", "reward_ci95", "kl", "win_rate", "mean_length", "distinct_2"]
        cells = [[who, *(f"{found[name]:.3f}" for name in names)] for who, found in evaluation.items()]
        return section("On held-out prompts", table(["model", *names], cells)) if cells else ""


def run_report(path: Path) -> Path:
    """Write ``report.html`` into a run directory from what the run left there; gives its path."""
    rows = read_metrics(path)
    config = read_flat_yaml(path / CONFIG)
    summary = path / "summary.json"
    parts = [held_out_table(summary)] if summary.is_file() else []
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
