"""The result of a run: everything that its directory holds, read when it is first asked for."""

from __future__ import annotations

import html
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.api.samples import Samples
from tether.errors import ConfigError, RunError
from tether.models.loading import load_policy
from tether.models.reward import load_reward_model
from tether.report.panels import panels_of
from tether.report.plots import COLOURS, STEP, Panel, figure, series_of
from tether.report.view import RunView
from tether.runtime.device import pick_device, pick_dtype
from tether.runtime.notebook import show_figures
from tether.types import Metrics
from tether.untrusted import printable

SHOWN = ("reward", "kl", "accuracy", "eval/reward", "eval/accuracy", "eval/loss", "loss", "completions/mean_length")
"""The metrics of the last row that a notebook shows."""


@dataclass(frozen=True)
class Run:
    """A run directory, made by a function such as ``tether.grpo.run`` or by a command: ``tether.Run("runs/grpo")``."""

    path: Path
    """The run directory. One that was made without ``out=`` is removed with this object."""
    temporary: bool = field(default=False, repr=False)
    """Whether the directory is removed with this object."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        _ = self._view  # an error now, where it is no run
        if self.temporary:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    @cached_property
    def _view(self) -> RunView:
        return RunView.read(self.path)

    @property
    def command(self) -> str:
        """The command that made it, such as ``grpo``."""
        return self._view.command

    @property
    def options(self) -> Mapping[str, Any]:
        """All options of the run, by their flat names."""
        return {name: value for name, value in self._view.config.items() if name not in ("format", "command")}

    @property
    def metrics(self) -> list[Metrics]:
        """The rows of ``metrics.jsonl``, one per step."""
        return list(self._view.rows)

    @property
    def summary(self) -> Mapping[str, Any]:
        """``summary.json``; empty where the run is not finished."""
        return self._view.summary

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The policy and its reference on the held-out prompts, as ``summary.json`` has them; empty without such
        prompts."""
        found: Mapping[str, Any] = self.summary.get("evaluation") or {}
        return found

    @property
    def model_path(self) -> Path:
        """The directory of the trained model, in the Hugging Face layout. Raises :class:`RunError` before there is
        one."""
        if not (self.path / "model").is_dir():
            raise RunError("the run has no model yet", where=self.path, hint="resume it")
        return self.path / "model"

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        load = load_reward_model if self.command == "reward" else load_policy
        options = self.options
        return load(str(self.model_path), dtype=pick_dtype(options["dtype"]), device=pick_device(options["device"]))

    @property
    def model(self) -> PreTrainedModel:
        """The trained model, a :mod:`transformers` one, in evaluation mode."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self._loaded[1]

    def frame(self) -> Any:
        """The metrics as a ``pandas.DataFrame``, one row per step."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("a DataFrame needs pandas", hint="pip install pandas, or use .metrics") from None
        return pandas.DataFrame(self.metrics)

    def samples(self, n: int = 8) -> Samples:
        """Completions of the last step that wrote its rollouts: ``n``, evenly spaced from the highest to the lowest
        score. Empty for commands that sample none."""
        found = self._view.samples
        if len(found) <= n:
            return Samples(tuple(found))
        return Samples(tuple(found[round(i * (len(found) - 1) / max(1, n - 1))] for i in range(n)))

    def plot(self, *metrics: str) -> Any:
        """A ``matplotlib.figure.Figure`` of these metrics over the steps, or of the first four of the report."""
        if unknown := [name for name in metrics if not any(name in row for row in self.metrics)]:
            raise ConfigError(f"the run has no metric {unknown[0]!r}", hint="run.metrics[-1] has the names")
        panels = [self._panel(name) for name in metrics] or panels_of([self._view])[:4]
        columns = 2 if len(panels) > 1 else 1
        show_figures()
        return figure(panels, columns=columns, width=4.5 * columns, height=2.9)

    def _panel(self, metric: str) -> Panel:
        series = series_of(self.metrics, metric, label=metric, colour=COLOURS[0])
        return Panel(title=metric, x_label=STEP, y_label="", series=[series])

    def save(self, directory: str | Path) -> Run:
        """Copy the run directory, ``model/`` included; to keep one that was made without ``out=``."""
        target = Path(directory)
        if target.exists():
            raise RunError("exists already", where=target, hint="give a directory that does not")
        shutil.copytree(self.path, target)
        return Run(target)

    def _repr_html_(self) -> str:
        return table_of(self)


def table_of(run: Run) -> str:
    """What a notebook shows of a run."""
    last = run.metrics[-1] if run.metrics else {}
    state = "finished" if run.summary else "not finished"
    if ended := run.summary.get("ended"):
        state = f"ended early: {ended}"
    cells = [("run", f"tether {run.command}, {state}"), ("directory", str(run.path)), ("steps", str(len(run.metrics)))]
    # the loss of a policy's step does not fall as the policy improves
    shown = [name for name in SHOWN if name in last and not (name == "loss" and "reward" in last)]
    cells += [(name, f"{last[name]:.4g}") for name in shown]
    for model, figures in run.evaluation.items():
        reward, half = figures.get("reward"), figures.get("reward_ci95")
        if reward is not None and half is not None:
            cells.append((f"held-out reward, {model}", f"{reward:.4g} ± {half:.2g}"))
    lines = (
        f"<tr><th style='text-align:left'>{html.escape(printable(name))}</th>"
        f"<td style='text-align:left'>{html.escape(printable(value))}</td></tr>"
        for name, value in cells
    )
    return f"<table>{''.join(lines)}</table>"
