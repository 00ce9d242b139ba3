"""The quickstart's page: what each method gained, at what distance, and what it reads like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tether.report.page import paragraph, plot, samples, section, table, write_page
from tether.report.plots import COLOURS, Panel, Series, series_of, svg
from tether.report.run import reading
from tether.runtime.directory import read_metrics
from tether.types import Metrics

COLOUR = dict(zip(("base", "rejection_sampling", "ppo", "grpo"), ("#5f5f5f", *COLOURS), strict=False))
GOLD, PROXY = "rewards/sentiment/mean", "rewards/reward/mean"
"""What the runs inside the quickstart call the gold reward and the learned one."""


def title(method: str) -> str:
    return {"base": "base", "rejection_sampling": "rejection sampling", "ppo": "PPO", "grpo": "GRPO"}[method]


def against_kl(methods: dict[str, dict[str, float]], runs: dict[str, list[Metrics]]) -> list[Panel]:
    """Gold and proxy over KL: the path of each run's training samples, and where it stands on held-out prompts."""
    panels = []
    for name, column, key in (("Gold reward", GOLD, "gold_reward"), ("Proxy reward", PROXY, "proxy_reward")):
        paths = [
            series_of(rows, column, label=f"{title(method)}, training", colour=COLOUR[method], x="kl")
            for method, rows in runs.items()
            if len(rows) > 1
        ]
        ends = [
            Series(
                label=f"{title(method)}, held out",
                x=[row["kl"]],
                y=[row[key]],
                colour=COLOUR[method],
                points=True,
                error=[row["gold_ci95"]] if key == "gold_reward" else None,
            )
            for method, row in methods.items()
        ]
        label = "KL to the base model, nats a completion"
        panels.append(Panel(title=f"{name} against KL", x_label=label, y_label=name.lower(), series=[*paths, *ends]))
    return panels


def over_steps(runs: dict[str, list[Metrics]]) -> list[Panel]:
    """Gold, proxy, KL and length over the steps of PPO and GRPO."""
    wanted = (
        ("Gold reward of the rollouts", GOLD),
        ("Proxy reward of the rollouts", PROXY),
        ("KL to the base model, nats a completion", "kl"),
        ("Completion length, tokens", "completions/mean_length"),
    )
    return [
        Panel(
            title=name,
            x_label="step",
            y_label="",
            series=[
                series_of(rows, column, label=title(method), colour=COLOUR[method])
                for method, rows in runs.items()
                if len(rows) > 1
            ],
        )
        for name, column in wanted
    ]


def judge_panels(rows: list[Metrics], judge: dict[str, Any]) -> list[Panel]:
    """The reward model's accuracy over its training, and its calibration on the pairs it is judged by."""
    bins: list[tuple[float, float, int]] = judge["calibration_bins"]
    last = max((row["step"] for row in rows), default=1.0)
    accuracy = [
        series_of(rows, "accuracy", label="training batches", colour=COLOURS[5]),
        series_of(rows, "eval/accuracy", label="held out, for stopping", colour=COLOURS[0]),
        Series(label="ceiling", x=[1, last], y=[judge["ceiling"]] * 2, colour=COLOURS[6], dashed=True),
    ]
    calibration = [
        Series(label="perfect", x=[0.5, 1], y=[0.5, 1], colour=COLOURS[6], dashed=True),
        Series(label="reward model", x=[b[0] for b in bins], y=[b[1] for b in bins], colour=COLOURS[0]),
    ]
    return [
        Panel(title="Accuracy of the reward model", x_label="step", y_label="pairs ranked right", series=accuracy),
        Panel(title="Calibration, held out", x_label="confidence", y_label="pairs ranked right", series=calibration),
    ]


def before_and_after(path: Path, prompts: int = 6) -> str:
    """The first completion of every method for some held-out prompts: not chosen, the first ones."""
    # as bytes: in text, characters that a completion may hold end a line too
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    seen = list(dict.fromkeys(row["prompt"] for row in rows))[:prompts]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        first.setdefault((row["prompt"], row["method"]), row)
    shown = [
        (f"{title(method)} (gold {row['gold']:+.2f})", prompt, row["completion"])
        for prompt in seen
        for method in COLOUR
        if (row := first.get((prompt, method)))
    ]
    return samples(shown)


def sections_of(path: Path) -> list[str]:
    """What the page of a quickstart's directory shows, from the files in it."""
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    methods, judge = summary["methods"], summary["reward_model"]
    runs = {name: read_metrics(path / name) for name in methods if name != "base"}
    header = [
        "method",
        "gold reward",
        "proxy reward",
        "KL, nats",
        "wins against base",
        "tokens",
        "distinct-2",
        "seconds",
    ]
    cells = [
        [
            title(name),
            f"{row['gold_reward']:+.3f} ± {row['gold_ci95']:.3f}",
            f"{row['proxy_reward']:+.2f}",
            f"{row['kl']:.1f}",
            f"{row['win_rate']:.0%}",
            f"{row['mean_length']:.1f}",
            f"{row['distinct_2']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for name, row in methods.items()
    ]
    return [
        section(
            "What each method gained",
            table(header, cells),
            paragraph(
                "Gold is the annotator's own score, which no method sees; proxy is the reward model's, which all "
                "optimise. A win is a higher gold score than the base model's for the same held-out prompt; ties count "
                "half. KL is how far a method moved from the base model to get there."
            ),
            plot(
                svg(against_kl(methods, runs)),
                "Lines: samples during training. Points: held-out prompts, gold with its 95% interval.",
            ),
        ),
        section("On the way", plot(svg(over_steps(runs)), "Means over the completions of a step.")),
        section(
            "The reward model",
            paragraph(
                f"{judge['accuracy']:.1%} of {judge['held_out_pairs']} held-out choices ranked right after training on "
                f"{judge['pairs']}. The annotator is noisy: knowing its score would give {judge['ceiling']:.1%}."
            ),
            plot(
                svg(judge_panels(read_metrics(path / "reward"), judge)),
                "Calibration: pairs of prompts that had no say in training or stopping.",
            ),
        ),
        section("Before and after, the first completions of the first held-out prompts", before_and_after(path)),
    ]


def quickstart_report(path: Path) -> Path:
    """Write ``report.html`` of a quickstart's directory; gives its path."""
    with reading(path):
        sections = sections_of(path)
    write_page(
        path / "report.html",
        "tether quickstart",
        "A small language model through all of RLHF: an annotator's choices, a reward model, and three ways to use it.",
        *sections,
    )
    return path / "report.html"
