"""What training commands share: load and check everything, open the run directory, compare, save, finish.

The order matters: whatever can be wrong with the input is found before the first file is written. A run that is resumed
takes the same path, and restores its state just before it trains.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import DataOptions, RunOptions
from tether.data.checks import DataReport
from tether.digests import digest
from tether.errors import ConfigError, GuardError, MemoryShortError, RewardError
from tether.flags import flatten
from tether.models.adapters import add_adapter, is_adapted
from tether.models.checkpointing import checkpoint_activations
from tether.models.fingerprint import weights_fingerprint
from tether.models.quantised import is_quantised
from tether.models.saving import save_model
from tether.observers import Hook, Tracker
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.device import Dtype, matrix_rate, pick_device, pick_dtype
from tether.runtime.directory import RunDirectory, begun_with, refuse_if_taken
from tether.runtime.files import atomic_write
from tether.runtime.journal import Journal
from tether.runtime.memory import resident_bytes
from tether.runtime.metric_names import require_known
from tether.runtime.progress import ProgressLine
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.trackers.names import require_installed
from tether.trackers.tracking import Tracking
from tether.training import inputs
from tether.training.card import write_card
from tether.training.estimate import tell
from tether.training.given import NOTHING, Given
from tether.training.inputs import (
    DATE,
    asks_for_the_date,
    fix_the_date,
    here,
    naming_the_model_of_a_run,
)
from tether.training.loading import placing, reader, set_matmul_dtype, tell_unpacked
from tether.training.workload import Extent
from tether.types import StepResult
from tether.untrusted import one_line

EVAL_SEED = "evaluation"


@dataclass(frozen=True)
class Start:
    """How a run starts: as a new one, or where it was interrupted."""

    resumed: bool = False
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those it had."""
    given: Given = NOTHING
    """What the options only name."""


NEW = Start()


class Options(Protocol):
    """The options of a training command, as far as all of them are alike."""

    @property
    def run(self) -> RunOptions: ...


@dataclass(frozen=True)
class Loaded:
    """The model that is trained, and an account of everything that was read for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    matmul_dtype: Dtype
    started: float
    """When loading began, by the monotonic clock."""
    report: DataReport = field(default_factory=DataReport)
    fingerprints: dict[str, str] = field(default_factory=dict)
    base: Path = field(default_factory=here)
    """What the paths among the options are relative to: where the command was given, wherever a reward goes."""
    date: str = ""
    """When the run began, in ISO format."""
    sometimes: set[str] = field(default_factory=set)
    """Metrics that not every row of the run has."""
    given: Given = NOTHING
    """What the options only name."""
    resident: int = 0
    """What the process had in RAM before anything was loaded, in bytes."""

    def reader(self, read: Callable[..., Any], data: DataOptions) -> Callable[..., Any]:
        """:func:`reader` for the model of the run; a source that was given in Python is read from memory."""
        known = reader(read, self.model, self.tokenizer, data, self.report)
        if data.chat.chat_template is not None:
            self.fingerprints["chat_template"] = digest(self.tokenizer.chat_template)
            keep_the_date(self, self.tokenizer)
        return lambda source, **more: known(self.given.rows.get(source, source), **more)


def load(run: RunOptions, start: Start, read: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Loaded:
    """The model that ``read`` finds, ready to be trained."""
    started, resident, base = time.monotonic(), resident_bytes(), here()
    require_installed(run.track)
    torch.manual_seed(run.seed)
    if not start.resumed:
        refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    with naming_the_model_of_a_run():
        model, tokenizer = read(**placing(run.device))
    if not run.quiet:
        tell_unpacked(model)
    found = weights_fingerprint(model)
    adapt(model, run)
    matmul_dtype = set_matmul_dtype(run.device.matmul_dtype, model)
    if run.checkpoint_activations:
        checkpoint_activations(model)
    began = begun_with(base / run.out).get(DATE) if start.resumed else None
    date = began or datetime.now().isoformat(timespec="seconds")
    loaded = Loaded(
        model,
        tokenizer,
        matmul_dtype,
        started,
        report=DataReport(quiet=run.quiet),
        fingerprints={"model": found, **start.given.fingerprints},
        base=base,
        date=date,
        given=start.given,
        resident=resident,
    )
    keep_the_date(loaded, tokenizer)
    return loaded


def adapt(model: PreTrainedModel, run: RunOptions) -> None:
    """Put the adapter that the options ask for into the model, which may have one of its own instead."""
    if not run.lora.lora_rank:
        if is_quantised(model) and not is_adapted(model):
            raise ConfigError(
                f"weights of {run.device.quantise} cannot be trained", where="--quantise", hint="give --lora-rank"
            )
        return
    if is_adapted(model):
        raise ConfigError(
            "the model is an adapter already, and is trained as it is",
            where="--lora-rank",
            hint="leave --lora-rank out, or give the whole model: tether merge writes it",
        )
    add_adapter(model, run.lora, seed=run.seed)


def keep_the_date(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the chat templates of a tokenizer the date on which the run began, and record it, where one asks for it."""
    if asks_for_the_date(tokenizer):
        loaded.fingerprints[DATE] = loaded.date
        fix_the_date(tokenizer, loaded.date)


def open_run(
    command: Options,
    start: Start,
    loaded: Loaded,
    *,
    title: str,
    state: RunState,
    total: int,
    rollouts_every: int = 0,
    hooks: Sequence[Hook] = (),
    extent: Extent | None = None,
) -> Recorder:
    """The run directory and everything that writes into it; ``title`` is the command's name, ``total`` its steps, and
    ``extent`` what its memory is estimated from."""
    run = command.run
    device = pick_device(run.device.device)
    options = {**inputs.located(flatten(command), loaded.base), **loaded.given.shown}
    config = {"command": title, **options, "matmul_dtype": loaded.matmul_dtype}
    require_known(run.keep_best, title, loaded.sometimes)
    directory = RunDirectory(
        loaded.base / run.out,
        config,
        fingerprints=loaded.fingerprints,
        data=loaded.report.as_dict(),
        skipped=loaded.report.skipped,
        overwrite=run.overwrite,
        resumed=start.resumed,
        given=run.out,
    )
    if not run.quiet:
        loaded.report.tell()
    dtype = pick_dtype("bfloat16" if run.device.dtype == "bfloat16" else loaded.matmul_dtype)
    return Recorder(
        directory=directory,
        checkpoints=Checkpoints(
            directory.path,
            loaded.tokenizer,
            Kept(last=run.keep_last, best=run.keep_best),
            overlap=device.type == "cuda",
        ),
        journal=Journal(directory),
        progress=ProgressLine(title, total, quiet=run.quiet),
        state=state,
        model=loaded.model,
        device=device,
        matrix_rate=matrix_rate(dtype, device),
        save_every=run.save_every,
        keep_checkpoints=run.keep_checkpoints,
        rollouts_every=rollouts_every,
        allowed=start.allowed,
        hooks=hooks,
        trackers=trackers_of(run, directory, total=total, rollouts_every=rollouts_every),
        sometimes=frozenset(loaded.sometimes),
        started=loaded.started,
        expected_gib=expected(title, command, loaded, extent, device) if extent else None,
    )


def expected(title: str, command: Options, loaded: Loaded, extent: Extent, device: torch.device) -> float | None:
    """The peak of the memory, in GiB, that the run is expected to take, which is said too; None for a quiet run, or
    with an optimizer of one's own, whose state is not known."""
    if command.run.quiet or loaded.given.optimizer is not None:
        return None
    return tell(title, command, extent, matmul_dtype=loaded.matmul_dtype, device=device, process=loaded.resident)


def trackers_of(run: RunOptions, directory: RunDirectory, *, total: int, rollouts_every: int) -> tuple[Tracker, ...]:
    """What ``--track`` asks for."""
    if not run.track:
        return ()
    tracking = Tracking(
        run.track,
        directory=directory.path,
        config=directory.config,
        total=total,
        rollouts_every=rollouts_every,
        resumed=directory.made,
        quiet=run.quiet,
    )
    return (tracking,)


def until_ended(results: Iterable[StepResult], recorder: Recorder) -> Iterator[StepResult]:
    """``results``, up to the one after which the run ends early; nothing where it had ended when it was resumed."""
    if recorder.ended:
        return
    for result in results:
        yield result
        if recorder.ended:
            return


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of a reward, the generator, a guard or memory say in which step they occurred."""
    try:
        yield
    except (RewardError, GuardError, MemoryShortError) as error:
        error.at(where)
        raise


def save(recorder: Recorder, write: Callable[[Path], None]) -> None:
    """``model/`` of the run directory, as ``write`` fills it: complete or not at all."""
    if recorder.writes:
        with atomic_write(recorder.directory.path / "model", durable=True) as unfinished:
            write(unfinished)


def save_policy(loaded: Loaded, recorder: Recorder) -> None:
    save(recorder, partial(save_model, loaded.model, loaded.tokenizer))


def finish(recorder: Recorder, summary: dict[str, Any], *, quiet: bool) -> None:
    """``summary.json``, and one line that says where things are."""
    if recorder.writes:
        write_card(recorder.directory.path, summary)
    recorder.finish(summary)
    if recorder.writes and not quiet:
        print(one_line("; ".join([last_line(recorder), *held_out_words(summary)])), file=sys.stderr)


def held_out_words(summary: Mapping[str, Any]) -> list[str]:
    """``held out: reward 0.89 ± 0.12 (reference -0.21), judge 5.1 ± 0.4 (reference 4.8), at 5.4 nats``, from the
    summary of a policy that was compared with its reference; nothing else has one."""
    compared = summary.get("evaluation")
    if not compared:
        return []
    said = [
        f"{name} {both['policy']['reward']:.3g} ± {both['policy']['reward_ci95']:.2g} "
        f"(reference {both['reference']['reward']:.3g})"
        for name, both in {"reward": compared, **summary.get("eval_rewards", {})}.items()
    ]
    return [f"held out: {', '.join(said)}, at {compared['policy']['kl']:.1f} nats"]


def last_line(recorder: Recorder) -> str:
    """``done in 12 s: runs/grpo``, and why the run ended early, which step's model it has and what its monitors found,
    where there is more to say."""
    parts = [f"done in {recorder.seconds:.0f} s: {recorder.directory.given}"]
    if recorder.expected_gib and recorder.peak_gib > recorder.peak_before:
        error = recorder.expected_gib / recorder.peak_gib - 1
        parts.append(f"memory {recorder.peak_gib:.2f} GiB at the peak, {error:+.0%} expected")
    if recorder.ended:
        parts.append(f"ended after step {recorder.recorded} of {recorder.progress.total}: {recorder.ended}")
    if best := recorder.best:
        parts.append(f"model/ is that of step {best.step}, the best {best.metric}: {best.value:.4g}")
    if alarms := recorder.directory.alarms():
        names = ", ".join(dict.fromkeys(row["monitor"] for row in alarms))
        parts.append(f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}, {names}: tether audit {recorder.directory.given}")
    return "; ".join(parts)
