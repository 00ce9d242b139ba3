"""Commands that look at models and runs: sample, measure, report. Those that train are in :mod:`tether.training`."""

from __future__ import annotations

import json
from pathlib import Path

from tether import config as options
from tether.algorithms import reward_model
from tether.data.checks import DataReport
from tether.data.records import load_pairs, load_prompts
from tether.errors import ConfigError
from tether.evaluation import evaluate_policy, sample_and_score
from tether.generation.engine import Engine
from tether.models.loading import context_length, load_policy
from tether.models.reward import load_reward_model
from tether.report.quickstart import quickstart_report
from tether.report.run import run_report
from tether.rewards.resolve import resolve_scorer
from tether.runtime.device import pick_device, pick_dtype
from tether.runtime.directory import read_metrics
from tether.runtime.files import require_file, whole
from tether.seeds import derive_seed
from tether.training import EVAL_SEED, settle_products
from tether.untrusted import printable


def generate(command: options.Generate) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    model, tokenizer = load_policy(command.model, dtype=pick_dtype(command.dtype), device=pick_device(command.device))
    settle_products(command.products, model)
    report = DataReport()
    prompts = load_prompts(
        command.prompts,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.overlong,
        on_bad_rows=command.on_bad_rows,
        report=report,
    )
    report.tell()
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
            default=repr,  # a column of dates, say
        )
        for group in groups
        for completion in group.completions
    ]
    if command.out is None:
        print("\n".join(map(printable, lines)))
        return
    with whole(Path(command.out)) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate(command: options.Eval) -> None:
    device, dtype, report = pick_device(command.device), pick_dtype(command.dtype), DataReport()
    if command.reward_model is not None and command.pairs is not None:
        judge, tokenizer = load_reward_model(command.reward_model, dtype=dtype, device=device)
        settle_products(command.products, judge)
        pairs = load_pairs(
            command.pairs,
            tokenizer,
            context=context_length(judge),
            overlong=command.overlong,
            on_bad_rows=command.on_bad_rows,
            report=report,
        )
        report.tell()
        evaluation = reward_model.evaluate(judge, pairs, token_budget=16384)
        print(json.dumps({"reward_model": command.reward_model, **vars(evaluation)}, indent=2))
        return
    assert command.model is not None
    assert command.prompts is not None
    model, tokenizer = load_policy(command.model, dtype=dtype, device=device)
    products = settle_products(command.products, model)
    score = resolve_scorer(command.reward, tokenizer, dtype=dtype, device=device, rounded=products == "bfloat16")
    prompts = load_prompts(
        command.prompts,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.overlong,
        on_bad_rows=command.on_bad_rows,
        report=report,
    )
    report.tell()
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
