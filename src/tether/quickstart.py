"""``tether quickstart``: all of RLHF on the embedded model, from a fixed seed, and what each method gains.

    prompts -> pairs of completions -> a noisy annotator's choices -> reward model
            -> rejection sampling, PPO and GRPO against the learned reward, and DPO on the choices themselves
            -> evaluation on held-out prompts

The annotator stands for the human. It holds VADER's lexicon (words rated by ten people each) and prefers the more
positive of two completions by a Bradley-Terry draw (:mod:`tether.annotator`). Its scores are the *gold* reward: no
method sees them, and each is judged by them. What the methods see is the reward model, the *proxy*, which learned from
the annotator's choices.

Every stage is one of tether's own commands, run through its Python function; its run directory lies inside the
quickstart's and can be inspected, reported on and repeated like any other.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import config
from tether.algorithms import dpo, grpo, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.optimise import Optim
from tether.annotator import Annotator, ceiling
from tether.data.records import load_pairs, load_prompts
from tether.evaluation import PolicyEvaluation, evaluate_policy, policy_kl, sample_and_score
from tether.generation.engine import Engine
from tether.models.loading import BASE, context_length, load_policy
from tether.models.reference import FrozenCopy
from tether.models.reward import load_reward_model
from tether.report.quickstart import SAMPLES, TITLES, WATCHED, print_summary
from tether.report.run import write_report
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.rewards.learned import LearnedReward
from tether.rewards.rules import sentiment
from tether.runtime.directory import RunDirectory
from tether.seeds import derive_seed
from tether.training.dpo import DPO
from tether.training.dpo import train as train_dpo
from tether.training.grpo import GRPO
from tether.training.grpo import train as train_grpo
from tether.training.ppo import PPO
from tether.training.ppo import train as train_ppo
from tether.training.rejection_sampling import RejectionSampling
from tether.training.rejection_sampling import train as train_rejection_sampling
from tether.training.reward import Reward
from tether.training.reward import train as train_reward
from tether.types import Prompt, Sampling, ScoredGroup

METHODS = tuple(TITLES)
GOLD, PROXY = "gold", "proxy"
SAMPLING = Sampling(max_new_tokens=28, temperature=0.8)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates of the quickstart. The defaults fit two cores in a few minutes."""

    model: str = BASE
    seed: int = 0
    train_prompts: int = 96
    judged_prompts: int = 16
    """Of the training prompts, those whose pairs the reward model is judged on; its training does not use them."""
    eval_prompts: int = 64
    eval_completions: int = 4
    """Per held-out prompt and method."""
    completions_per_prompt: int = 48
    """Sampled per training prompt, and shown to the annotator in pairs."""
    sharpness: float = 8.0
    """The annotator prefers a to b with probability sigmoid(sharpness * (gold_a - gold_b))."""
    least_difference: float = 0.3
    """Pairs whose gold rewards differ by less are not shown to the annotator."""
    sampling: Sampling = SAMPLING
    reward: reward_model.Config = field(
        default_factory=lambda: reward_model.Config(epochs=1.5, batch_size=16, evals_per_epoch=4)
    )
    rejection_sampling: rejection_sampling.Config = field(
        default_factory=lambda: rejection_sampling.Config(
            group_size=24,
            top_k=2,
            sampling=SAMPLING,
            sft=sft.Config(epochs=3.0, batch_size=16, optim=Optim(learning_rate=4e-4, warmup_steps=3)),
        )
    )
    steps: int = 28
    """Of PPO and of GRPO."""
    prompts_per_step: int = 16
    save_every: int = 10
    """Steps between checkpoints."""
    ppo: ppo.Config = field(
        default_factory=lambda: ppo.Config(
            group_size=4,
            kl_coef=0.08,
            sampling=SAMPLING,
            optim=Optim(learning_rate=4e-4, adam_beta2=0.95, adam_eps=1e-5),
        )
    )
    grpo: grpo.Config = field(
        default_factory=lambda: grpo.Config(
            group_size=4, kl_coef=0.04, sampling=SAMPLING, optim=Optim(learning_rate=3e-4, adam_beta2=0.95)
        )
    )
    dpo: dpo.Config = field(
        default_factory=lambda: dpo.Config(beta=0.2, batch_size=16, optim=Optim(learning_rate=3e-4, warmup_steps=10))
    )


def quickstart(out: Path, settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Everything, from sampling pairs to ``report.html`` in ``out``; gives what ``summary.json`` holds."""
    started = time.monotonic()
    directory = RunDirectory(out, {"command": "quickstart", "seed": settings.seed}, overwrite=overwrite)
    say("1/4 sampling from the base model, and asking the annotator")
    reachable = make_pairs(directory, settings)
    say("2/4 training the reward model on the annotator's choices")
    train_reward_model(out, settings)
    judged = judge_reward_model(out)
    say("3/4 improving the base model against the reward model")
    seconds = train_methods(out, settings)
    say("4/4 judging all of them on held-out prompts")
    found, samples = evaluate(out, settings)
    directory.write_rows(SAMPLES, samples)
    summary = {
        "reward_model": reward_model_summary(out, judged, reachable),
        "methods": {name: method_summary(one, seconds[name]) for name, one in found.items()},
        "alarms": {name: alarms_of(out / name) for name in WATCHED},
        "seconds": time.monotonic() - started,
    }
    directory.summary(summary)
    write_report([out])
    print_summary(summary)
    return summary


def alarms_of(run: Path) -> list[dict[str, Any]]:
    """What the monitors of a run have found."""
    found: list[dict[str, Any]] = json.loads((run / "summary.json").read_text(encoding="utf-8"))["alarms"]
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def asset(name: str) -> str:
    return str(resources.files("tether") / "assets" / name)


def _prompts(
    source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[Prompt]:
    limit = settings.sampling.max_new_tokens
    return load_prompts(source, tokenizer, context=context_length(model), max_new_tokens=limit)


def make_pairs(directory: RunDirectory, settings: Settings) -> float:
    """Write ``pairs.jsonl`` and ``judged_pairs.jsonl``, of different prompts; gives the accuracy that knowing the gold
    reward would give on the judged ones: the choices are noisy."""
    rows = Path(asset("prompts_train.jsonl")).read_text(encoding="utf-8").splitlines()[: settings.train_prompts]
    directory.write_rows("prompts.jsonl", [json.loads(row) for row in rows])
    model, tokenizer = load_policy(settings.model)
    prompts = _prompts(str(directory.path / "prompts.jsonl"), model, tokenizer, settings)
    groups = sample_and_score(
        Engine(model, tokenizer),
        WeightedSum(((FunctionReward(GOLD, sentiment(None)), 1.0),)),
        prompts,
        group_size=settings.completions_per_prompt,
        sampling=settings.sampling,
        seed=derive_seed(settings.seed, "pairs"),
    )
    annotator = Annotator(sharpness=settings.sharpness, least_difference=settings.least_difference, seed=settings.seed)
    judged, learned = groups[: settings.judged_prompts], groups[settings.judged_prompts :]
    pairs = list(annotator.pairs(judged))
    directory.write_rows("judged_pairs.jsonl", pairs)
    directory.write_rows("pairs.jsonl", list(annotator.pairs(learned)))
    return ceiling(pairs)


def judge_reward_model(out: Path) -> reward_model.Evaluation:
    """The reward model on pairs of prompts that neither its training nor its early stopping has seen."""
    model, tokenizer = load_reward_model(str(out / "reward" / "model"))
    pairs = load_pairs(str(out / "judged_pairs.jsonl"), tokenizer, context=context_length(model))
    return reward_model.evaluate(model, pairs, token_budget=16384)


def _run(out: Path, name: str, settings: Settings) -> config.RunOptions:
    return config.RunOptions(out=str(out / name), seed=settings.seed, save_every=settings.save_every)


def _task(out: Path) -> config.PromptOptions:
    """Prompts and rewards of all methods: the proxy is optimised; gold has weight 0 and is only watched."""
    return config.PromptOptions(
        prompts=str(out / "prompts.jsonl"), reward=(str(out / "reward" / "model"), "sentiment=0"), rollouts_every=5
    )


def train_reward_model(out: Path, settings: Settings) -> None:
    """Train the reward model on the annotator's choices."""
    pairs, run = str(out / "pairs.jsonl"), _run(out, "reward", settings)
    # judged on pairs of its own, which it does not see
    train_reward(Reward(model=settings.model, pairs=pairs, test_share=0, run=run, reward=settings.reward))


def train_methods(out: Path, settings: Settings) -> dict[str, float]:
    """Train a model by each method, in a run directory of its name; gives the seconds that each took."""
    model, task = settings.model, _task(out)
    length = config.Steps(steps=settings.steps, prompts_per_step=settings.prompts_per_step)

    def rejection_sampling_run(run: config.RunOptions) -> None:
        options = settings.rejection_sampling
        train_rejection_sampling(RejectionSampling(model=model, task=task, run=run, rejection_sampling=options))

    def ppo_run(run: config.RunOptions) -> None:
        train_ppo(PPO(model=model, task=task, run=run, length=length, ppo=settings.ppo))

    def grpo_run(run: config.RunOptions) -> None:
        train_grpo(GRPO(model=model, task=task, run=run, length=length, grpo=settings.grpo))

    def dpo_run(run: config.RunOptions) -> None:
        train_dpo(DPO(model=model, pairs=str(out / "pairs.jsonl"), run=run, dpo=settings.dpo))

    seconds = {"base": 0.0}
    runs = {"rejection_sampling": rejection_sampling_run, "ppo": ppo_run, "grpo": grpo_run, "dpo": dpo_run}
    for name, train in runs.items():
        started = time.monotonic()
        train(_run(out, name, settings))
        seconds[name] = time.monotonic() - started
    return seconds


def evaluate(out: Path, settings: Settings) -> tuple[dict[str, PolicyEvaluation], list[dict[str, Any]]]:
    """Every method on the held-out prompts with the same seeds, by gold and by proxy; and what each wrote."""
    base, tokenizer = load_policy(settings.model)
    judge, judge_tokenizer = load_reward_model(str(out / "reward" / "model"))
    proxy = LearnedReward(PROXY, judge, judge_tokenizer, same_vocabulary=True)
    score = WeightedSum(((FunctionReward(GOLD, sentiment(None)), 1.0), (proxy, 0.0)))
    prompts = _prompts(asset("prompts_heldout.jsonl"), base, tokenizer, settings)[: settings.eval_prompts]
    models = {name: base if name == "base" else load_policy(str(out / name / "model"))[0] for name in METHODS}
    sampled = {
        name: sample_and_score(
            Engine(model, tokenizer),
            score,
            prompts,
            group_size=settings.eval_completions,
            sampling=settings.sampling,
            seed=derive_seed(settings.seed, "evaluation"),
        )
        for name, model in models.items()
    }
    reference, temperature = FrozenCopy(base), settings.sampling.temperature
    kl = {
        name: policy_kl(sampled[name], policy=model, reference=reference, temperature=temperature)
        for name, model in models.items()
        if model is not base
    }
    found = {name: evaluate_policy(sampled[name], sampled["base"], kl=kl.get(name, 0.0)) for name in models}
    return found, [row for name, groups in sampled.items() for group in groups for row in sample_rows(name, group)]


def sample_rows(method: str, group: ScoredGroup) -> list[dict[str, Any]]:
    """One row of ``samples.jsonl`` per completion."""
    return [
        {
            "method": method,
            "prompt": group.rollouts.prompt.text,
            "completion": completion.text,
            "gold": score.parts[GOLD],
            "proxy": score.parts[PROXY],
        }
        for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
    ]


def reward_model_summary(out: Path, judged: reward_model.Evaluation, reachable: float) -> dict[str, Any]:
    """How well the reward model predicts the choices that it is judged by, and how well it could."""
    trained = json.loads((out / "reward" / "summary.json").read_text(encoding="utf-8"))
    return {
        "pairs": trained["pairs"],
        "accuracy": judged.accuracy,
        "ceiling": reachable,
        "held_out_pairs": judged.pairs,
        "calibration_error": judged.calibration_error,
        "calibration_bins": [list(row) for row in judged.bins],
    }


def method_summary(found: PolicyEvaluation, seconds: float) -> dict[str, float]:
    """The figures of one method on the held-out prompts, and the seconds that its training took."""
    return {
        "gold_reward": found.rewards[GOLD],
        "gold_ci95": found.reward_ci95,
        "proxy_reward": found.rewards[PROXY],
        "kl": found.kl,
        "win_rate": found.win_rate,
        "mean_length": found.mean_length,
        "distinct_2": found.distinct_2,
        "seconds": seconds,
    }


def main(command: config.Quickstart) -> None:
    quickstart(Path(command.out), Settings(seed=command.seed), overwrite=command.overwrite)
