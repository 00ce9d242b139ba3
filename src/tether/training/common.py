"""What training commands share: load and check everything, open the run directory, compare, save, finish.

The order matters: whatever can be wrong with the input is found before the first file is written. A run that is resumed
takes the same path, and restores its state just before it trains.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import DataOptions, PromptOptions, RunOptions
from tether.data.checks import DataReport, keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_prompts
from tether.errors import ConfigError, GuardError, MemoryShortError, RewardError
from tether.evaluation import evaluate_policy, policy_kl, sample_and_score
from tether.flags import flatten
from tether.generation.engine import Engine
from tether.models.checkpointing import checkpoint_activations
from tether.models.fingerprint import weights_fingerprint
from tether.models.linear import round_matmuls
from tether.models.loading import context_length, save_model
from tether.models.reference import Reference
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum
from tether.rewards.learned import LearnedReward
from tether.rewards.resolve import resolve_scorer
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.device import Dtype, MatmulDtype, matrix_rate, pick_device, pick_dtype, pick_matmul_dtype
from tether.runtime.directory import RunDirectory, begun_with, refuse_if_taken
from tether.runtime.files import atomic_write
from tether.runtime.journal import Journal, JournaledGenerator, JournaledScorer
from tether.runtime.progress import ProgressLine
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.seeds import derive_seed
from tether.training import inputs
from tether.training.inputs import (
    DATE,
    absolute_rewards,
    asks_for_the_date,
    fix_the_date,
    here,
    naming_the_model_of_a_run,
)
from tether.types import Generator, Prompt, Sampling, ScoredGroup, Scorer

EVAL_SEED = "evaluation"
EVALUATED = {
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/loss", "eval/calibration_error", "eval/margin"),
}
"""The metrics that the rows of some steps have only, by command."""


@dataclass(frozen=True)
class Start:
    """How a run starts: as a new one, or where it was interrupted."""

    resumed: bool = False
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those it had."""


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


@dataclass(frozen=True)
class Task:
    """What a policy is to do, and what that is worth."""

    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    score: WeightedSum
    engine: Engine


def set_matmul_dtype(name: MatmulDtype, model: PreTrainedModel) -> Dtype:
    """Choose the precision that the model multiplies in, and apply it."""
    matmul_dtype = pick_matmul_dtype(name, model)
    if matmul_dtype == "bfloat16":
        round_matmuls(model)
    return matmul_dtype


def load(run: RunOptions, start: Start, read: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Loaded:
    """The model that ``read`` finds, ready to be trained."""
    started, base = time.monotonic(), here()
    torch.manual_seed(run.seed)
    if not start.resumed:
        refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    with naming_the_model_of_a_run():
        model, tokenizer = read(dtype=pick_dtype(run.device.dtype), device=pick_device(run.device.device))
    found = weights_fingerprint(model)
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
        fingerprints={"model": found},
        base=base,
        date=date,
    )
    keep_the_date(loaded, tokenizer)
    return loaded


def keep_the_date(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the chat templates of a tokenizer the date on which the run began, and record it, where one asks for it."""
    if asks_for_the_date(tokenizer):
        loaded.fingerprints[DATE] = loaded.date
        fix_the_date(tokenizer, loaded.date)


def reader(read: Callable[..., Any], loaded: Loaded, data: DataOptions) -> Callable[..., Any]:
    """``read``, one of the loaders of :mod:`tether.data.records`, for the model and the options of a run."""
    return partial(
        read,
        tokenizer=loaded.tokenizer,
        context=context_length(loaded.model),
        overlong=data.overlong,
        on_bad_rows=data.on_bad_rows,
        report=loaded.report,
    )


def require_room(model: PreTrainedModel, sampling: Sampling) -> None:
    """Raise :class:`ConfigError` where completions alone can fill the context, so that no prompt fits."""
    context = context_length(model)
    if sampling.max_new_tokens >= context:
        raise ConfigError(
            f"max_new_tokens is {sampling.max_new_tokens}, and the model's context of {context} tokens holds the "
            "prompt too",
            hint=f"give --max-new-tokens less than {context}",
        )


def load_task(options: PromptOptions, loaded: Loaded, sampling: Sampling) -> Task:
    """Prompts and rewards of a policy-training command."""
    model, data = loaded.model, options.data
    require_room(model, sampling)
    read = reader(load_prompts, loaded, data)
    training = read(options.prompts, max_new_tokens=sampling.max_new_tokens)
    held_out = (
        read(options.eval_prompts, max_new_tokens=sampling.max_new_tokens) if options.eval_prompts is not None else []
    )
    training = keep_apart(training, held_out, report=loaded.report, on_bad_rows=data.on_bad_rows)
    with naming_the_model_of_a_run():
        score = resolve_scorer(
            absolute_rewards(options.reward, loaded.base),
            loaded.tokenizer,
            dtype=model.dtype,
            device=model.device,
            rounded=loaded.matmul_dtype == "bfloat16",
            deadline=options.reward_deadline_seconds,
            retries=options.reward_retries,
        )
    loaded.sometimes.update(
        f"rewards/{reward.name}/{figure}" for reward, _ in score.rewards for figure in ("mean", "std")
    )
    sources = {options.prompts: training} | ({options.eval_prompts: held_out} if options.eval_prompts else {})
    score = prepared(score, sources, max_new_tokens=sampling.max_new_tokens)
    loaded.fingerprints.update(prompts=fingerprint(training), eval_prompts=fingerprint(held_out))
    for reward, _ in score.rewards:
        if isinstance(reward, LearnedReward):
            loaded.fingerprints[f"reward {reward.name}"] = weights_fingerprint(reward.model)
            keep_the_date(loaded, reward.tokenizer)
    return Task(training, held_out, score, Engine(model, loaded.tokenizer, budget=options.budget))


def open_run(
    command: Options,
    start: Start,
    loaded: Loaded,
    *,
    title: str,
    state: RunState,
    total: int,
    rollouts_every: int = 0,
) -> Recorder:
    """The run directory and everything that writes into it; ``title`` is the command's name, ``total`` its steps."""
    run = command.run
    device = pick_device(run.device.device)
    config = {"command": title, **inputs.located(flatten(command), loaded.base), "matmul_dtype": loaded.matmul_dtype}
    unevaluated = title == "sft" and config["eval_data"] is None
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
        device=device,
        matrix_rate=matrix_rate(dtype, device),
        save_every=run.save_every,
        rollouts_every=rollouts_every,
        allowed=start.allowed,
        sometimes=frozenset(loaded.sometimes.union(() if unevaluated else EVALUATED.get(title, ()))),
        started=loaded.started,
    )


def journaled(task: Task, recorder: Recorder) -> tuple[Generator, Scorer]:
    """The generator and the scorer of a run's steps; a step that is repeated after a kill gets what it had. The journal
    is one process's: several ranks go without it."""
    if recorder.world.size > 1:
        return task.engine, task.score
    return JournaledGenerator(task.engine, recorder.journal), JournaledScorer(task.score, recorder.journal)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of a reward, the generator, a guard or memory say in which step they occurred."""
    try:
        yield
    except (RewardError, GuardError, MemoryShortError) as error:
        error.at(where)
        raise


def held_out_comparison(
    loaded: Loaded, task: Task, reference: Reference, sampling: Sampling, seed: int
) -> dict[str, Any]:
    """The trained policy and its reference on the held-out prompts, with the same seeds; empty without such prompts."""
    if not task.eval_prompts:
        return {}

    def sampled(model: PreTrainedModel) -> list[ScoredGroup]:
        engine = Engine(model, loaded.tokenizer, budget=task.engine.budget)
        return sample_and_score(
            engine,
            task.score,
            task.eval_prompts,
            group_size=1,
            sampling=sampling,
            seed=derive_seed(seed, EVAL_SEED),
        )

    with reference.model() as frozen:
        against = sampled(frozen)
    groups = sampled(loaded.model)
    kl = policy_kl(groups, policy=loaded.model, reference=reference, temperature=sampling.temperature or 1.0)
    return {
        "reference": evaluate_policy(against, against, kl=0.0).as_dict(),
        "policy": evaluate_policy(groups, against, kl=kl).as_dict(),
    }


def save(recorder: Recorder, write: Callable[[Path], None]) -> None:
    """``model/`` of the run directory, as ``write`` fills it: complete or not at all."""
    if recorder.writes:
        with atomic_write(recorder.directory.path / "model", durable=True) as unfinished:
            write(unfinished)


def save_policy(loaded: Loaded, recorder: Recorder) -> None:
    save(recorder, partial(save_model, loaded.model, loaded.tokenizer))


def finish(recorder: Recorder, summary: dict[str, Any], *, quiet: bool) -> None:
    """``summary.json``, and one line that says where things are."""
    recorder.finish(summary)
    if recorder.writes and not quiet:
        print(f"done in {recorder.seconds:.0f} s: {recorder.directory.given}", file=sys.stderr)
