"""``tether sft``: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tether.algorithms import sft
from tether.config import DataOptions, RunOptions
from tether.data.checks import keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_demonstrations
from tether.models.loading import load_policy
from tether.observers import Hook, Monitor
from tether.runtime.metric_names import EVALUATED
from tether.runtime.state import RunState
from tether.training.common import NEW, Start, finish, load, located, open_run, save_policy, until_ended
from tether.training.estimate import extent_of, of_demonstrations


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a model on texts or on prompts with completions."""

    model: str
    """Model to fine-tune: a directory, a hub id or 'base'."""
    data: str
    """Rows with text, with prompt and completion, or with messages: a file or a hub id."""
    eval_data: str | None = None
    """Held-out rows of the same kind; their loss is measured at the end of each epoch, and is not unless given."""
    data_options: DataOptions = field(default_factory=DataOptions)
    run: RunOptions
    sft: sft.Config = field(default_factory=sft.Config)


def train(command: SFT, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()) -> None:
    """Load, train, save, and sum up."""
    run = command.run
    loaded = load(run, start, partial(load_policy, command.model))
    read = loaded.reader(load_demonstrations, command.data_options)
    data, held_out = read(command.data), read(command.eval_data) if command.eval_data else []
    data = keep_apart(data, held_out, report=loaded.report, on_bad_rows=command.data_options.on_bad_rows)
    loaded.fingerprints.update(data=fingerprint(data), eval_data=fingerprint(held_out))
    if held_out:
        loaded.sometimes.update(EVALUATED["sft"])
    state = sft.State.create(loaded.model, len(data), command.sft, seed=run.seed, optimizer=start.given.optimizer)
    recorder = open_run(
        command,
        start,
        loaded,
        title="sft",
        state=RunState(state, tuple(monitors)),
        total=state.total_steps,
        hooks=hooks,
        extent=extent_of(loaded.model, run, of_demonstrations(data)),
    )
    with recorder.session(stop_after=run.stop_after_seconds):
        results = sft.steps(state, data, held_out, config=command.sft, world=recorder.world)
        for result in until_ended(results, recorder):
            recorder.record(state.step, result, last=state.step == state.total_steps)
        with located("sft"):
            state.guard.require_sound_end()
        recorder.take_best()
        save_policy(loaded, recorder)
        summary = {"demonstrations": len(data), "steps": recorder.recorded, "last": recorder.row}
        finish(recorder, summary, quiet=run.quiet)
