"""What each command does: load and check everything, make the run directory, train, save, and sum up.

The order matters: whatever can be wrong with the input is found before the first file is written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import config as options
from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.data.batching import epoch_order
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import ConfigError, DataError
from tether.evaluation import evaluate_policy, sample_and_score
from tether.flags import flatten
from tether.generation.engine import Engine
from tether.models.checkpointing import checkpoint_activations
from tether.models.loading import context_length, load_policy, save_model
from tether.models.precision import round_products
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model
from tether.report.quickstart import quickstart_report
from tether.report.run import run_report
from tether.rewards.resolve import resolve_scorer
from tether.runtime.device import Dtype, Products, matrix_rate, pick_device, pick_dtype, pick_products
from tether.runtime.directory import RunDirectory, read_metrics, refuse_if_taken
from tether.runtime.files import require_file, whole
from tether.runtime.loops import Recorder, run_policy, run_rejection_sampling, run_reward_model, run_sft
from tether.runtime.progress import ProgressLine
from tether.seeds import derive_seed
from tether.types import Prompt, Sampling, Scorer, StepResult

EVAL_SEED = "evaluation"


@dataclass(frozen=True)
class Setting:
    """A policy with its task, loaded and checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    score: Scorer
    engine: Engine
    products: Dtype


def settle_products(name: Products, model: PreTrainedModel) -> Dtype:
    """Choose what the model multiplies in, and see to it."""
    products = pick_products(name, model)
    if products == "bfloat16":
        round_products(model)
    return products


def load_setting(name: str, task: options.PromptOptions, run: options.RunOptions, sampling: Sampling) -> Setting:
    """Model, prompts and rewards of a policy-training command."""
    refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    device, dtype = pick_device(run.device), pick_dtype(run.dtype)
    model, tokenizer = load_policy(name, dtype=dtype, device=device)
    products = settle_products(run.products, model)
    if run.checkpoint_activations:
        checkpoint_activations(model)

    def prompts(source: str) -> list[Prompt]:
        return load_prompts(
            source,
            tokenizer,
            context=context_length(model),
            max_new_tokens=sampling.max_new_tokens,
            overlong=task.overlong,
        )

    return Setting(
        model=model,
        tokenizer=tokenizer,
        prompts=prompts(task.prompts),
        eval_prompts=prompts(task.eval_prompts) if task.eval_prompts else [],
        score=resolve_scorer(task.reward, tokenizer, dtype=dtype, device=device, rounded=products == "bfloat16"),
        engine=Engine(model, tokenizer, budget=task.budget),
        products=products,
    )


def open_run(
    command: Any,
    run: options.RunOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    total: int,
    products: Dtype,
    rollouts_every: int = 0,
) -> Recorder:
    """The run directory and everything that writes into it."""
    device = pick_device(run.device)
    config = {"command": title, **flatten(command), "products": products}
    directory = RunDirectory(Path(run.out), config, overwrite=run.overwrite)
    return Recorder(
        directory=directory,
        tokenizer=tokenizer,
        progress=ProgressLine(title, total, quiet=run.quiet),
        device=device,
        matrix_rate=matrix_rate(pick_dtype("bfloat16" if run.dtype == "bfloat16" else products), device),
        save_every=run.save_every,
        rollouts_every=rollouts_every,
    )


def held_out_comparison(setting: Setting, reference: PreTrainedModel, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The trained policy and its reference on the held-out prompts, with the same seeds; empty without such prompts."""
    if not setting.eval_prompts:
        return {}
    seed = derive_seed(seed, EVAL_SEED)
    sampled = {
        name: sample_and_score(
            Engine(model, setting.tokenizer, budget=setting.engine.budget),
            setting.score,
            setting.eval_prompts,
            group_size=1,
            sampling=sampling,
            seed=seed,
        )
        for name, model in (("reference", reference), ("policy", setting.model))
    }
    return {
        name: evaluate_policy(
            sampled[name],
            sampled["reference"],
            policy=model,
            reference=reference,
            temperature=sampling.temperature or 1.0,
        ).as_dict()
        for name, model in (("reference", reference), ("policy", setting.model))
    }


def finish(recorder: Recorder, summary: dict[str, Any], *, started: float, quiet: bool) -> None:
    """``summary.json``, and one line that says where things are."""
    whole = {**summary, "seconds": round(time.monotonic() - started, 3)}
    recorder.directory.summary(whole)
    if not quiet:
        print(f"done in {whole['seconds']:.0f} s: {recorder.directory.path}", file=sys.stderr)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recorder: Recorder) -> None:
    """``model/`` of the run directory, whole or not at all."""
    with whole(recorder.directory.path / "model") as unfinished:
        save_model(model, tokenizer, unfinished)


def train_sft(command: options.SFT) -> None:
    started, run = time.monotonic(), command.run
    torch.manual_seed(run.seed)
    refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    model, tokenizer = load_policy(command.model, dtype=pick_dtype(run.dtype), device=pick_device(run.device))
    products = settle_products(run.products, model)
    if run.checkpoint_activations:
        checkpoint_activations(model)
    context = context_length(model)
    data = load_demonstrations(command.data, tokenizer, context=context, overlong=command.overlong)
    held_out = (
        load_demonstrations(command.eval_data, tokenizer, context=context, overlong=command.overlong)
        if command.eval_data
        else []
    )
    state = sft.State.create(model, len(data), command.sft, seed=run.seed)
    recorder = open_run(command, run, tokenizer, title="sft", total=state.total_steps, products=products)
    with recorder.progress:
        last = run_sft(state, data, held_out, config=command.sft, recorder=recorder)
    save(model, tokenizer, recorder)
    finish(recorder, {"demonstrations": len(data), "steps": state.step, "last": last}, started=started, quiet=run.quiet)


def train_reward(command: options.Reward) -> None:
    started, run = time.monotonic(), command.run
    torch.manual_seed(run.seed)
    refuse_if_taken(Path(run.out), overwrite=run.overwrite)
    model, tokenizer = new_reward_model(
        command.model, seed=run.seed, dtype=pick_dtype(run.dtype), device=pick_device(run.device)
    )
    products = settle_products(run.products, model)
    if run.checkpoint_activations:
        checkpoint_activations(model)
    context = context_length(model)
    pairs = load_pairs(command.pairs, tokenizer, context=context, overlong=command.overlong)
    if command.eval_pairs:
        held_out = load_pairs(command.eval_pairs, tokenizer, context=context, overlong=command.overlong)
    else:
        order = epoch_order(len(pairs), seed=derive_seed(run.seed, "held out"), epoch=0)
        count = max(1, round(command.eval_share * len(pairs)))
        if count >= len(pairs):
            raise DataError(f"{command.pairs}: {len(pairs)} pairs are too few to hold any out; give --eval-pairs")
        held_out, pairs = [pairs[i] for i in order[:count]], [pairs[i] for i in order[count:]]
    state = reward_model.State.create(model, len(pairs), command.reward, seed=run.seed)
    recorder = open_run(command, run, tokenizer, title="reward", total=state.total_steps, products=products)
    with recorder.progress:
        evaluation = run_reward_model(state, pairs, held_out, config=command.reward, recorder=recorder)
    probes = reward_model.sides(held_out[:8])
    save_reward_model(model, tokenizer, recorder.directory.path / "model", probes)
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
    finish(recorder, summary, started=started, quiet=run.quiet)


def train_rejection_sampling(command: options.RejectionSampling) -> None:
    started, run, config = time.monotonic(), command.run, command.rejection_sampling
    torch.manual_seed(run.seed)
    setting = load_setting(command.model, command.task, run, config.sampling)
    state = rejection_sampling.State.create(setting.model, seed=run.seed)
    recorder = open_run(
        command,
        run,
        setting.tokenizer,
        title="rejection-sampling",
        total=config.rounds,
        products=setting.products,
        rollouts_every=command.task.rollouts_every,
    )
    with recorder.progress:
        results = run_rejection_sampling(
            state, setting.prompts, generate=setting.engine, score=setting.score, config=config, recorder=recorder
        )
    recorder.directory.write_rows(
        "selected.jsonl",
        [
            {
                "round": number,
                "prompt": list(one.prompt.messages) if one.prompt.messages else one.prompt.text,
                "completion": [{"role": "assistant", "content": one.completion.text}]
                if one.prompt.messages
                else one.completion.text,
                "score": one.score.total,
                "prompt_ids": list(one.prompt.ids),
                "completion_ids": list(one.completion.ids),
            }
            for number, result in enumerate(results, 1)
            for one in result.selected
        ],
    )
    save(setting.model, setting.tokenizer, recorder)
    evaluation = held_out_comparison(setting, state.reference, config.sampling, run.seed)
    summary = {"rounds": state.round, "last": results[-1].metrics, "evaluation": evaluation}
    finish(recorder, summary, started=started, quiet=run.quiet)


def train_ppo(command: options.PPO) -> None:
    torch.manual_seed(command.run.seed)
    setting = load_setting(command.model, command.task, command.run, command.ppo.sampling)
    state = ppo.State.create(
        setting.model,
        command.ppo,
        prompts=len(setting.prompts),
        total_steps=command.length.steps,
        seed=command.run.seed,
    )
    step = partial(ppo.step, state, generate=setting.engine, score=setting.score, config=command.ppo)
    train_policy("ppo", command, setting, state, step, command.ppo.sampling)


def train_grpo(command: options.GRPO) -> None:
    torch.manual_seed(command.run.seed)
    setting = load_setting(command.model, command.task, command.run, command.grpo.sampling)
    state = grpo.State.create(
        setting.model,
        command.grpo,
        prompts=len(setting.prompts),
        total_steps=command.length.steps,
        seed=command.run.seed,
    )
    step = partial(
        grpo.step,
        state,
        generate=setting.engine,
        score=setting.score,
        config=command.grpo,
        fresh=partial(state.cursor.take, setting.prompts),
    )
    train_policy("grpo", command, setting, state, step, command.grpo.sampling)


def train_policy(
    title: str,
    command: options.PPO | options.GRPO,
    setting: Setting,
    state: ppo.State | grpo.State,
    step: Callable[[Sequence[Prompt]], StepResult],
    sampling: Sampling,
) -> None:
    """All steps of PPO or GRPO; then save the policy, compare it with its reference, sum up."""
    started, run = time.monotonic(), command.run
    recorder = open_run(
        command,
        run,
        setting.tokenizer,
        title=title,
        total=state.total_steps,
        products=setting.products,
        rollouts_every=command.task.rollouts_every,
    )
    with recorder.progress:
        last = run_policy(
            state, step, setting.prompts, prompts_per_step=command.length.prompts_per_step, recorder=recorder
        )
    save(setting.model, setting.tokenizer, recorder)
    evaluation = held_out_comparison(setting, state.reference, sampling, run.seed)
    finish(recorder, {"steps": state.step, "last": last, "evaluation": evaluation}, started=started, quiet=run.quiet)


def generate(command: options.Generate) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    model, tokenizer = load_policy(command.model, dtype=pick_dtype(command.dtype), device=pick_device(command.device))
    settle_products(command.products, model)
    prompts = load_prompts(
        command.prompts,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.overlong,
    )
    groups = Engine(model, tokenizer, budget=command.budget).generate(
        prompts, group_size=command.group_size, sampling=command.sampling, seed=command.seed
    )
    lines = [
        json.dumps(
            {
                **group.prompt.columns,
                "prompt": list(group.prompt.messages) if group.prompt.messages else group.prompt.text,
                "completion": completion.text,
                "finish": completion.finish.value,
                "tokens": len(completion.ids),
            },
            ensure_ascii=False,
        )
        for group in groups
        for completion in group.completions
    ]
    if command.out is None:
        print("\n".join(lines))
        return
    with whole(Path(command.out)) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate(command: options.Eval) -> None:
    device, dtype = pick_device(command.device), pick_dtype(command.dtype)
    if command.reward_model is not None and command.pairs is not None:
        judge, tokenizer = load_reward_model(command.reward_model, dtype=dtype, device=device)
        settle_products(command.products, judge)
        pairs = load_pairs(command.pairs, tokenizer, context=context_length(judge), overlong=command.overlong)
        evaluation = reward_model.evaluate(judge, pairs, token_budget=16384)
        print(json.dumps({"reward_model": command.reward_model, **vars(evaluation)}, indent=2))
        return
    assert command.model is not None
    assert command.prompts is not None
    model, tokenizer = load_policy(command.model, dtype=dtype, device=device)
    products = settle_products(command.products, model)
    score = resolve_scorer(command.reward, tokenizer, dtype=dtype, device=device, rounded=products == "bfloat16")
    limit = context_length(model)
    prompts = load_prompts(
        command.prompts,
        tokenizer,
        context=limit,
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.overlong,
    )
    reference, own = (
        load_policy(command.reference, dtype=dtype, device=device) if command.reference else (model, tokenizer)
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"--reference {command.reference}: its tokenizer is not the model's, so there is no KL between them"
        )
    settle_products(products, reference)
    seed = derive_seed(command.seed, EVAL_SEED)
    groups, against = (
        sample_and_score(
            Engine(m, tokenizer, budget=command.budget),
            score,
            prompts,
            group_size=command.group_size,
            sampling=command.sampling,
            seed=seed,
        )
        for m in (model, reference)
    )
    found = evaluate_policy(
        groups, against, policy=model, reference=reference, temperature=command.sampling.temperature or 1.0
    ).as_dict()
    if command.reference is None:
        found = {name: value for name, value in found.items() if name not in ("kl", "win_rate")}
    print(json.dumps({"model": command.model, "reference": command.reference, **found}, indent=2))


def report(command: options.Report) -> None:
    path = Path(command.directory)
    read_metrics(path)  # refuses what is not a run
    write = quickstart_report if (path / "samples.jsonl").is_file() else run_report
    print(write(path))
