"""The quickstart's page: what each method gained, at what distance, and what it reads like."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tether.report.files import reading
from tether.report.page import bullets, paragraph, plots, samples, section, table, whole_page
from tether.report.panels import against_kl, held_out_point, over_steps, paths_over_kl
from tether.report.plots import COLOURS, STEP, Panel, Series, series_of
from tether.report.view import RunView
from tether.untrusted import printable

TITLES = {"base": "base", "rejection_sampling": "rejection sampling", "ppo": "PPO", "grpo": "GRPO", "dpo": "DPO"}
"""Method to what it is called; every method but the base model is a run in a directory of its name."""
COLOUR = dict(zip(TITLES, ("#5f5f5f", *COLOURS), strict=False))
GOLD, PROXY = "rewards/sentiment/mean", "rewards/reward/mean"
"""What the runs inside the quickstart call the gold reward and the learned one."""
SAMPLES = "samples.jsonl"
"""The completions that the methods are compared by; of all run directories, only a quickstart's has this file."""

WATCHED = ("rejection_sampling", "ppo", "grpo")
"""The methods that sample, whose monitors see what they write."""

COLUMNS = ("method", "gold reward", "proxy reward", "KL, nats", "wins against base", "tokens", "distinct-2", "seconds")


def comparison_cells(methods: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The table of the methods, one row each: what :data:`COLUMNS` names."""
    return [
        [
            TITLES[name],
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


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """In words: which methods gained by gold, and which of them exploit the proxy by the look of what they write."""
    methods, alarms = summary["methods"], summary.get("alarms", {})
    base = methods["base"]["gold_reward"]
    gained = [TITLES[name] for name, row in methods.items() if row["gold_reward"] - row["gold_ci95"] > base]
    said = [f"By gold, which none was trained on, better than base: {', '.join(gained) or 'none'}."]
    for name in WATCHED:
        for row in alarms.get(name, ()):
            said.append(f"{TITLES[name]}, step {int(row['step'])}, {row['monitor']}: {row['message']}.")
    quiet = [TITLES[name] for name in WATCHED if name in alarms and not alarms[name]]
    if quiet:
        said.append(f"No monitor raised an alarm in {', '.join(quiet)}.")
    if any(alarms.values()):
        said.append("Read the samples behind each alarm: a high reward may be earned in an unintended way.")
    return said


def print_summary(summary: Mapping[str, Any]) -> None:
    """The table of the methods, the reward model's accuracy and the verdict, on the terminal."""
    judge = summary["reward_model"]
    grid = Table(title="held-out prompts", title_justify="left")
    for column in COLUMNS:
        grid.add_column(column, justify="left" if column == "method" else "right")
    for cells in comparison_cells(summary["methods"]):
        grid.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(grid)
    console.print(
        f"reward model: {judge['accuracy']:.1%} of {judge['held_out_pairs']} held-out choices predicted, after "
        f"{judge['pairs']} pairs; the noise in the choices allows {judge['ceiling']:.1%}"
    )
    for line in verdict(summary):
        console.print(Text(printable(line)))


def frontier_panels(methods: Mapping[str, Mapping[str, float]], views: Sequence[RunView]) -> list[Panel]:
    """Gold and proxy over KL: the path of each run's training samples, and where each method stands on held-out
    prompts."""
    panels = []
    for name, metric, key in (("Gold reward", GOLD, "gold_reward"), ("Proxy reward", PROXY, "proxy_reward")):
        held_out = [
            held_out_point(
                f"{TITLES[method]}, held out",
                COLOUR[method],
                kl=row["kl"],
                reward=row[key],
                ci95=row["gold_ci95"] if key == "gold_reward" else None,
            )
            for method, row in methods.items()
        ]
        panel = against_kl(
            paths_over_kl(views, [metric] * len(views), suffix=", training"),
            held_out,
            title=f"{name} against KL",
            x_label="KL to the base model, nats per completion",
            y_label=name.lower(),
        )
        panels.append(panel)
    return panels


def progress_panels(views: Sequence[RunView]) -> list[Panel]:
    """Gold, proxy, KL and length over the steps of the methods that have several."""
    wanted = (
        ("Gold reward of the rollouts", GOLD),
        ("Proxy reward of the rollouts", PROXY),
        ("KL to the base model, nats per completion", "kl"),
        ("Completion length, tokens", "completions/mean_length"),
    )
    return [over_steps(views, metric, title=title) for title, metric in wanted]


def judge_panels(view: RunView, judge: Mapping[str, Any]) -> list[Panel]:
    """The reward model's accuracy during its training, and its calibration on the pairs it is judged by."""
    bins: list[tuple[float, float, int]] = judge["calibration_bins"]
    last = max((row["step"] for row in view.rows), default=1.0)
    accuracy = [
        series_of(view.rows, "accuracy", label="training batches", colour=COLOURS[5]),
        series_of(view.rows, "eval/accuracy", label="held out, for stopping", colour=COLOURS[0]),
        Series(label="ceiling", x=[1, last], y=[judge["ceiling"]] * 2, colour=COLOURS[6], dashed=True),
    ]
    calibration = [
        Series(label="perfect", x=[0.5, 1], y=[0.5, 1], colour=COLOURS[6], dashed=True),
        Series(label="reward model", x=[b[0] for b in bins], y=[b[1] for b in bins], colour=COLOURS[0]),
    ]
    return [
        Panel(title="Accuracy of the reward model", x_label=STEP, y_label="pairs ranked right", series=accuracy),
        Panel(title="Calibration, held out", x_label="confidence", y_label="pairs ranked right", series=calibration),
    ]


def before_and_after(path: Path, prompts: int = 6) -> str:
    """The first completion of every method for some held-out prompts: not chosen, the first ones."""
    # as bytes: in text, characters that a completion may hold end a line too
    rows = [json.loads(line) for line in (path / SAMPLES).read_bytes().splitlines()]
    seen = list(dict.fromkeys(row["prompt"] for row in rows))[:prompts]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        first.setdefault((row["prompt"], row["method"]), row)
    shown = [
        (f"{TITLES[method]} (gold {row['gold']:+.2f})", prompt, row["completion"])
        for prompt in seen
        for method in TITLES
        if (row := first.get((prompt, method)))
    ]
    return samples(shown)


def sections_of(path: Path) -> list[str]:
    """What the page of a quickstart's directory shows, from the files in it."""
    summary = RunView.read(path).summary
    methods, judge = summary["methods"], summary["reward_model"]
    views = [RunView.read(path / name, name=TITLES[name]) for name in methods if name != "base"]
    return [
        section(
            "What each method gained",
            bullets(verdict(summary)),
            table(COLUMNS, comparison_cells(methods)),
            paragraph(
                "Gold is the annotator's own score, which no method sees; proxy is the reward model's, which all but "
                "DPO optimise: it learns from the choices. A win is a higher gold score than the base model's for the "
                "same held-out prompt; ties count half. KL is how far a method moved from the base model to get there."
            ),
            plots(
                frontier_panels(methods, views),
                "Lines: samples during training. Points: held-out prompts, gold with its 95% interval.",
            ),
        ),
        section("On the way", plots(progress_panels(views), "Means over the completions of a step.")),
        section(
            "The reward model",
            paragraph(
                f"{judge['accuracy']:.1%} of {judge['held_out_pairs']} held-out choices ranked right after training on "
                f"{judge['pairs']}. The annotator is noisy: knowing its score would give {judge['ceiling']:.1%}."
            ),
            plots(
                judge_panels(RunView.read(path / "reward"), judge),
                "Calibration: pairs of prompts that neither training nor early stopping has used.",
            ),
        ),
        section("Before and after, the first completions of the first held-out prompts", before_and_after(path)),
    ]


def is_quickstart(path: Path) -> bool:
    """Whether a run directory is a quickstart's."""
    return (path / SAMPLES).is_file()


def runs_in(paths: Sequence[Path], methods: Sequence[str] = WATCHED) -> list[Path]:
    """The run directories that are meant: a quickstart's stands for those of its ``methods``."""
    return [run for path in paths for run in ([path / name for name in methods] if is_quickstart(path) else [path])]


def quickstart_page(path: Path) -> bytes:
    """The page of the quickstart in ``path``. Raises :class:`tether.errors.RunError`, with the file or the directory at
    fault."""
    with reading(path):
        sections = sections_of(path)
    return whole_page(
        "tether quickstart",
        "A small language model through all of RLHF: an annotator's choices, a reward model, three ways to use it, and "
        "DPO, which uses the choices themselves.",
        *sections,
    )
