"""What each training command does: load and check everything, train, save, and sum up.

The order matters: whatever can be wrong with the input is found before the first file is written. A run that goes on
after an interruption takes the same way, and finds its state again just before it trains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import config as options
from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.data.batching import epoch_order
from tether.data.checks import DataReport, keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tether.evaluation import evaluate_policy, sample_and_score
from tether.flags import flatten
from tether.generation.engine import Engine
from tether.models.checkpointing import checkpoint_activations
from tether.models.fingerprint import weights_fingerprint
from tether.models.loading import context_length, load_policy, save_model
from tether.models.precision import round_products
from tether.models.reward import new_reward_model, save_reward_model
from tether.rewards.combine import WeightedSum
from tether.rewards.learned import LearnedReward
from tether.rewards.resolve import resolve_scorer
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.device import Dtype, Products, matrix_rate, pick_device, pick_dtype, pick_products
from tether.runtime.directory import RunDirectory, refuse_if_taken
from tether.runtime.files import whole
from tether.runtime.journal import Journal, PaidGenerator, PaidScorer
from tether.runtime.loops import Recorder, run_policy, run_rejection_sampling, run_reward_model, run_sft
from tether.runtime.progress import ProgressLine
from tether.seeds import derive_seed
from tether.types import Prompt, Sampling, StepResult

EVAL_SEED = "evaluation"


@dataclass(frozen=True)
class Start:
    """How a run begins: as a new one, or where it was interrupted."""

    resumed: bool = False
    allowed: frozenset[str] = frozenset()
    """Options that may differ from those it had."""


NEW = Start()


@dataclass(frozen=True)
class Loaded:
    """The model that is trained, and an account of everything that was read for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    products: Dtype
    began: float
    """When loading did, by the monotonic clock."""
    report: DataReport = field(default_factory=DataReport)
    fingerprints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a policy is to do, and what that is worth."""

    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    score: WeightedSum
    engine: Engine


def settle_products(name: Products, model: PreTrainedModel) -> Dtype:
    """Choose what the model multiplies in, and see to it."""
    products = pick_products(name, model)
    if products == "bfloat16":
        round_products(model)
    return products


def load(
    run: options.RunOptions, start: Start, read: Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> Loaded:
    """The model that ``read`` finds, ready to be trained."""
    began = time.monotonic()
    torch.manual_seed(run.seed)
    if not start.resumed:
        refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    model, tokenizer = read(dtype=pick_dtype(run.dtype), device=pick_device(run.device))
    found = weights_fingerprint(model)
    products = settle_products(run.products, model)
    if run.checkpoint_activations:
        checkpoint_activations(model)
    return Loaded(model, tokenizer, products, began, fingerprints={"model": found})


def load_task(task: options.PromptOptions, loaded: Loaded, sampling: Sampling) -> Task:
    """Prompts and rewards of a policy-training command."""
    model, tokenizer = loaded.model, loaded.tokenizer

    def prompts(source: str | None) -> list[Prompt]:
        if source is None:
            return []
        return load_prompts(
            source,
            tokenizer,
            context=context_length(model),
            max_new_tokens=sampling.max_new_tokens,
            overlong=task.overlong,
            on_bad_rows=task.on_bad_rows,
            report=loaded.report,
        )

    training, held_out = prompts(task.prompts), prompts(task.eval_prompts)
    training = keep_apart(training, held_out, report=loaded.report, on_bad_rows=task.on_bad_rows)
    score = resolve_scorer(
        task.reward,
        tokenizer,
        dtype=model.dtype,
        device=model.device,
        rounded=loaded.products == "bfloat16",
        deadline=task.reward_deadline_seconds,
        retries=task.reward_retries,
    )
    loaded.fingerprints.update(prompts=fingerprint(training), eval_prompts=fingerprint(held_out))
    for reward, _ in score.rewards:
        if isinstance(reward, LearnedReward):
            loaded.fingerprints[f"reward {reward.name}"] = weights_fingerprint(reward.model)
    return Task(training, held_out, score, Engine(model, tokenizer, budget=task.budget))


def open_run(
    command: Any,
    run: options.RunOptions,
    start: Start,
    loaded: Loaded,
    *,
    title: str,
    total: int,
    rollouts_every: int = 0,
) -> Recorder:
    """The run directory and everything that writes into it."""
    device = pick_device(run.device)
    config = {"command": title, **flatten(command), "products": loaded.products}
    directory = RunDirectory(
        Path(run.out),
        config,
        fingerprints=loaded.fingerprints,
        data=loaded.report.as_dict(),
        skipped=loaded.report.skipped,
        overwrite=run.overwrite,
        resumed=start.resumed,
    )
    if not run.quiet:
        loaded.report.tell()
    dtype = pick_dtype("bfloat16" if run.dtype == "bfloat16" else loaded.products)
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
        device=device,
        matrix_rate=matrix_rate(dtype, device),
        save_every=run.save_every,
        rollouts_every=rollouts_every,
        allowed=start.allowed,
        started=loaded.began,
    )


def held_out_comparison(
    loaded: Loaded, task: Task, reference: PreTrainedModel, sampling: Sampling, seed: int
) -> dict[str, Any]:
    """The trained policy and its reference on the held-out prompts, with the same seeds; empty without such prompts."""
    if not task.eval_prompts:
        return {}
    seed = derive_seed(seed, EVAL_SEED)
    models = {"reference": reference, "policy": loaded.model}
    sampled = {
        name: sample_and_score(
            Engine(model, loaded.tokenizer, budget=task.engine.budget),
            task.score,
            task.eval_prompts,
            group_size=1,
            sampling=sampling,
            seed=seed,
        )
        for name, model in models.items()
    }
    return {
        name: evaluate_policy(
            sampled[name],
            sampled["reference"],
            policy=model,
            reference=reference,
            temperature=sampling.temperature or 1.0,
        ).as_dict()
        for name, model in models.items()
    }


def finish(recorder: Recorder, summary: dict[str, Any], *, quiet: bool) -> None:
    """``summary.json``, and one line that says where things are."""
    seconds = round(recorder.seconds, 3)
    recorder.tidy()
    recorder.checkpoints.finish()
    recorder.journal.remove()  # before the summary: with one, nobody comes back to it
    recorder.directory.summary({**summary, "seconds": seconds})
    if not quiet:
        print(f"done in {seconds:.0f} s: {recorder.directory.path}", file=sys.stderr)


def save(loaded: Loaded, recorder: Recorder) -> None:
    """``model/`` of the run directory, whole or not at all."""
    with whole(recorder.directory.path / "model", durable=True) as unfinished:
        save_model(loaded.model, loaded.tokenizer, unfinished)


def train_sft(command: options.SFT, start: Start = NEW) -> None:
    run = command.run
    loaded = load(run, start, partial(load_policy, command.model))
    read = partial(
        load_demonstrations,
        tokenizer=loaded.tokenizer,
        context=context_length(loaded.model),
        overlong=command.overlong,
        on_bad_rows=command.on_bad_rows,
        report=loaded.report,
    )
    data, held_out = read(command.data), read(command.eval_data) if command.eval_data else []
    data = keep_apart(data, held_out, report=loaded.report, on_bad_rows=command.on_bad_rows)
    loaded.fingerprints.update(data=fingerprint(data), eval_data=fingerprint(held_out))
    state = sft.State.create(loaded.model, len(data), command.sft, seed=run.seed)
    recorder = open_run(command, run, start, loaded, title="sft", total=state.total_steps)
    with recorder.session(state, stop_after=run.stop_after_seconds):
        run_sft(state, data, held_out, config=command.sft, recorder=recorder)
        save(loaded, recorder)
        summary = {"demonstrations": len(data), "steps": state.step, "last": recorder.row}
        finish(recorder, summary, quiet=run.quiet)


def train_reward(command: options.Reward, start: Start = NEW) -> None:
    run = command.run
    loaded = load(run, start, partial(new_reward_model, command.model, seed=run.seed))
    model = loaded.model
    read = partial(
        load_pairs,
        tokenizer=loaded.tokenizer,
        context=context_length(model),
        overlong=command.overlong,
        on_bad_rows=command.on_bad_rows,
        report=loaded.report,
    )
    pairs = read(command.pairs)
    if command.eval_pairs:
        held_out = read(command.eval_pairs)
        pairs = keep_apart(pairs, held_out, report=loaded.report, on_bad_rows=command.on_bad_rows)
    else:
        order = epoch_order(len(pairs), seed=derive_seed(run.seed, "held out"), epoch=0)
        count = max(1, round(command.eval_share * len(pairs)))
        if count >= len(pairs):
            raise DataError(f"{command.pairs}: {len(pairs)} pairs are too few to hold any out; give --eval-pairs")
        held_out, pairs = [pairs[i] for i in order[:count]], [pairs[i] for i in order[count:]]
        # a pair that the file holds twice may lie on both sides of the cut
        pairs = keep_apart(pairs, held_out, report=loaded.report, on_bad_rows="skip")
    loaded.fingerprints.update(pairs=fingerprint(pairs), eval_pairs=fingerprint(held_out))
    state = reward_model.State.create(model, len(pairs), command.reward, seed=run.seed)
    recorder = open_run(command, run, start, loaded, title="reward", total=state.total_steps)
    with recorder.session(state, stop_after=run.stop_after_seconds):
        evaluation = run_reward_model(state, pairs, held_out, config=command.reward, recorder=recorder)
        probes = reward_model.sides(held_out[:8])
        with whole(recorder.directory.path / "model", durable=True) as unfinished:
            save_reward_model(model, loaded.tokenizer, unfinished, probes)
        summary = {
            "pairs": len(pairs),
            "held_out_pairs": len(held_out),
            "steps": state.step,
            "best_step": state.best_step,
            "accuracy": evaluation.accuracy,
            "log_loss": evaluation.log_loss,
            "calibration_error": evaluation.calibration_error,
            "calibration_bins": evaluation.bins,
            "score_mean": model.config.score_mean,
            "score_std": model.config.score_std,
        }
        finish(recorder, summary, quiet=run.quiet)


def train_rejection_sampling(command: options.RejectionSampling, start: Start = NEW) -> None:
    run, config = command.run, command.rejection_sampling
    loaded = load(run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, config.sampling)
    state = rejection_sampling.State.create(loaded.model, config, prompts=len(task.prompts), seed=run.seed)
    recorder = open_run(
        command,
        run,
        start,
        loaded,
        title="rejection-sampling",
        total=config.rounds,
        rollouts_every=command.task.rollouts_every,
    )
    with recorder.session(state, stop_after=run.stop_after_seconds):
        task.engine.load_weights(state.round, state.policy.named_parameters())
        run_rejection_sampling(
            state,
            task.prompts,
            generate=PaidGenerator(task.engine, recorder.journal),
            score=PaidScorer(task.score, recorder.journal),
            config=config,
            recorder=recorder,
        )
        save(loaded, recorder)
        evaluation = held_out_comparison(loaded, task, state.reference, config.sampling, run.seed)
        summary = {"rounds": state.round, "last": recorder.row, "evaluation": evaluation}
        finish(recorder, summary, quiet=run.quiet)


def train_ppo(command: options.PPO, start: Start = NEW) -> None:
    loaded = load(command.run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, command.ppo.sampling)
    state = ppo.State.create(
        loaded.model,
        command.ppo,
        prompts=len(task.prompts),
        total_steps=command.length.steps,
        seed=command.run.seed,
    )
    step = partial(ppo.step, state, config=command.ppo)
    train_policy("ppo", command, start, loaded, task, state, step, command.ppo.sampling)


def train_grpo(command: options.GRPO, start: Start = NEW) -> None:
    loaded = load(command.run, start, partial(load_policy, command.model))
    task = load_task(command.task, loaded, command.grpo.sampling)
    state = grpo.State.create(
        loaded.model,
        command.grpo,
        prompts=len(task.prompts),
        total_steps=command.length.steps,
        seed=command.run.seed,
    )
    step = partial(grpo.step, state, config=command.grpo, fresh=partial(state.cursor.take, task.prompts))
    train_policy("grpo", command, start, loaded, task, state, step, command.grpo.sampling)


def train_policy(
    title: str,
    command: options.PPO | options.GRPO,
    start: Start,
    loaded: Loaded,
    task: Task,
    state: ppo.State | grpo.State,
    step: Callable[..., StepResult],
    sampling: Sampling,
) -> None:
    """All steps of PPO or GRPO; then save the policy, compare it with its reference, sum up."""
    run = command.run
    recorder = open_run(
        command,
        run,
        start,
        loaded,
        title=title,
        total=state.total_steps,
        rollouts_every=command.task.rollouts_every,
    )
    step = partial(
        step,
        generate=PaidGenerator(task.engine, recorder.journal),
        score=PaidScorer(task.score, recorder.journal),
    )
    with recorder.session(state, stop_after=run.stop_after_seconds):
        task.engine.load_weights(state.step, state.policy.named_parameters())
        run_policy(state, step, task.prompts, prompts_per_step=command.length.prompts_per_step, recorder=recorder)
        save(loaded, recorder)
        evaluation = held_out_comparison(loaded, task, state.reference, sampling, run.seed)
        finish(recorder, {"steps": state.step, "last": recorder.row, "evaluation": evaluation}, quiet=run.quiet)
