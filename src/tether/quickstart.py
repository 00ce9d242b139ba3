"""``tether quickstart``: all of RLHF on the embedded model, from a fixed seed, and what each method gained by it.

    prompts -> pairs of completions -> a noisy annotator's choices -> reward model
            -> rejection sampling, PPO and GRPO against the learned reward -> evaluation on held-out prompts

The annotator stands for the human. It holds VADER's lexicon (words rated by ten people each) and prefers the more
positive of two completions by a Bradley-Terry draw. Its scores are the *gold* reward: no method sees them, and each is
judged by them. What the methods see is the reward model, the *proxy*, which learned from the annotator's choices.

Every stage is one of tether's own commands, run through its Python function; its run directory lies inside the
quickstart's and can be looked at, reported on and repeated like any other.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tether import config, training
from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.optimise import Optim
from tether.data.records import load_pairs, load_prompts
from tether.evaluation import PolicyEvaluation, evaluate_policy, sample_and_score
from tether.generation.engine import Engine
from tether.models.loading import BASE, context_length, load_policy
from tether.models.reward import load_reward_model
from tether.report.quickstart import quickstart_report
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.rewards.learned import LearnedReward
from tether.rewards.rules import sentiment
from tether.runtime.directory import RunDirectory
from tether.seeds import derive_seed, generator
from tether.types import Sampling, ScoredGroup

METHODS = ("base", "rejection_sampling", "ppo", "grpo")
GOLD, PROXY = "gold", "proxy"


SAMPLING = Sampling(max_new_tokens=28, temperature=0.8)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates of the quickstart. The defaults fit two cores in a few minutes."""

    model: str = BASE
    seed: int = 0
    train_prompts: int = 96
    judged_prompts: int = 16
    """Of the training prompts, those whose pairs the reward model is judged on; they have no say in its training."""
    eval_prompts: int = 64
    eval_completions: int = 4
    """For each held-out prompt and method."""
    completions_per_prompt: int = 48
    """Sampled for each training prompt, and shown to the annotator two by two."""
    sharpness: float = 8.0
    """The annotator prefers a to b with probability sigmoid(sharpness * (gold_a - gold_b))."""
    least_difference: float = 0.3
    """Pairs whose gold rewards differ by less are not shown to the annotator."""
    sampling: Sampling = SAMPLING
    reward: reward_model.Config = field(default_factory=lambda: reward_model.Config(epochs=1.5, batch_size=16))
    rejection_sampling: rejection_sampling.Config = field(
        default_factory=lambda: rejection_sampling.Config(
            samples_per_prompt=24,
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
            group_size=4, kl_coef=0.08, sampling=SAMPLING, optim=Optim(learning_rate=3e-4, adam_beta2=0.95)
        )
    )


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Stands for the human: prefers the higher gold reward, the more reliably the larger the difference."""

    sharpness: float
    least_difference: float
    seed: int

    def probability(self, difference: float) -> float:
        """P(the first of two is preferred), Bradley-Terry."""
        return 1.0 / (1.0 + math.exp(-self.sharpness * difference))

    def pairs(self, groups: Sequence[ScoredGroup]) -> Iterator[dict[str, Any]]:
        """One of a prompt's better half beside one of its worse half, where they are apart by ``least_difference`` or
        more: clear cases teach more than near-ties. ``clear`` is the chance that the draw went to the better side.
        """
        for number, group in enumerate(groups):
            lot = torch.rand(len(group.scores), generator=generator(self.seed, "annotator", number)).tolist()
            rows = zip(group.rollouts.completions, group.scores, strict=True)
            ranked = sorted(rows, key=lambda row: -row[1].total)
            half = len(ranked) // 2
            for (a, score_a), (b, score_b), u in zip(ranked[:half], ranked[-half:], lot, strict=False):
                difference = score_a.total - score_b.total
                if abs(difference) < self.least_difference or not (a.text.strip() and b.text.strip()):
                    continue
                probability = self.probability(difference)
                chosen, rejected = (a, b) if u < probability else (b, a)
                yield {
                    "prompt": group.rollouts.prompt.text,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "clear": max(probability, 1 - probability),
                }


def quickstart(out: Path, settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Everything, from sampling pairs to ``report.html`` in ``out``; gives what ``summary.json`` holds."""
    started = time.monotonic()
    directory = RunDirectory(out, {"command": "quickstart", "seed": settings.seed}, overwrite=overwrite)
    say("1/4 sampling from the base model, and asking the annotator")
    ceiling = make_pairs(directory, settings)
    say("2/4 training the reward model on the annotator's choices")
    training.train_reward(reward_options(out, settings))
    judged = judge_reward_model(out)
    say("3/4 improving the base model against the reward model")
    seconds = {"base": 0.0}
    for method, train in (
        ("rejection_sampling", lambda: training.train_rejection_sampling(rejection_sampling_options(out, settings))),
        ("ppo", lambda: training.train_ppo(ppo_options(out, settings))),
        ("grpo", lambda: training.train_grpo(grpo_options(out, settings))),
    ):
        clock = time.monotonic()
        train()
        seconds[method] = time.monotonic() - clock
    say("4/4 judging all of them on held-out prompts")
    found, samples = evaluate(out, settings)
    directory.write_rows("samples.jsonl", samples)
    summary = summarise(out, judged, found, ceiling, seconds)
    summary["seconds"] = time.monotonic() - started
    directory.summary(summary)
    quickstart_report(out)
    show(summary)
    return summary


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def asset(name: str) -> str:
    return str(resources.files("tether") / "assets" / name)


def make_pairs(directory: RunDirectory, settings: Settings) -> float:
    """Write ``pairs.jsonl`` and ``judged_pairs.jsonl``, of different prompts; gives the ceiling of the accuracy on the
    judged ones: the share that the annotator's own gold reward would predict of its noisy choices.
    """
    rows = Path(asset("prompts_train.jsonl")).read_text(encoding="utf-8").splitlines()[: settings.train_prompts]
    directory.write_rows("prompts.jsonl", [json.loads(row) for row in rows])
    model, tokenizer = load_policy(settings.model)
    prompts = load_prompts(
        str(directory.path / "prompts.jsonl"),
        tokenizer,
        context=context_length(model),
        max_new_tokens=settings.sampling.max_new_tokens,
    )
    groups = sample_and_score(
        Engine(model, tokenizer),
        WeightedSum(((FunctionReward(GOLD, sentiment(None)), 1.0),)),
        prompts,
        group_size=settings.completions_per_prompt,
        sampling=settings.sampling,
        seed=derive_seed(settings.seed, "pairs"),
    )
    annotator = Annotator(sharpness=settings.sharpness, least_difference=settings.least_difference, seed=settings.seed)
    judged = list(annotator.pairs(groups[: settings.judged_prompts]))
    directory.write_rows("judged_pairs.jsonl", judged)
    directory.write_rows("pairs.jsonl", list(annotator.pairs(groups[settings.judged_prompts :])))
    return sum(pair["clear"] for pair in judged) / len(judged)


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


def reward_options(out: Path, settings: Settings) -> config.Reward:
    return config.Reward(
        model=settings.model,
        pairs=str(out / "pairs.jsonl"),
        run=_run(out, "reward", settings),
        reward=settings.reward,
    )


def rejection_sampling_options(out: Path, settings: Settings) -> config.RejectionSampling:
    return config.RejectionSampling(
        model=settings.model,
        task=_task(out),
        run=_run(out, "rejection_sampling", settings),
        rejection_sampling=settings.rejection_sampling,
    )


def ppo_options(out: Path, settings: Settings) -> config.PPO:
    return config.PPO(
        model=settings.model,
        task=_task(out),
        run=_run(out, "ppo", settings),
        length=config.Steps(steps=settings.steps, prompts_per_step=settings.prompts_per_step),
        ppo=settings.ppo,
    )


def grpo_options(out: Path, settings: Settings) -> config.GRPO:
    return config.GRPO(
        model=settings.model,
        task=_task(out),
        run=_run(out, "grpo", settings),
        length=config.Steps(steps=settings.steps, prompts_per_step=settings.prompts_per_step),
        grpo=settings.grpo,
    )


def evaluate(out: Path, settings: Settings) -> tuple[dict[str, PolicyEvaluation], list[dict[str, Any]]]:
    """Every method on the held-out prompts with the same seeds, by gold and by proxy; and what each wrote."""
    base, tokenizer = load_policy(settings.model)
    judge, judge_tokenizer = load_reward_model(str(out / "reward" / "model"))
    proxy = LearnedReward(PROXY, judge, judge_tokenizer, same_vocabulary=True)
    score = WeightedSum(((FunctionReward(GOLD, sentiment(None)), 1.0), (proxy, 0.0)))
    prompts = load_prompts(
        asset("prompts_heldout.jsonl"),
        tokenizer,
        context=context_length(base),
        max_new_tokens=settings.sampling.max_new_tokens,
    )[: settings.eval_prompts]
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
    found = {
        name: evaluate_policy(
            sampled[name], sampled["base"], policy=model, reference=base, temperature=settings.sampling.temperature
        )
        for name, model in models.items()
    }
    rows = [
        {
            "method": name,
            "prompt": group.rollouts.prompt.text,
            "completion": completion.text,
            "gold": one.parts[GOLD],
            "proxy": one.parts[PROXY],
        }
        for name, groups in sampled.items()
        for group in groups
        for completion, one in zip(group.rollouts.completions, group.scores, strict=True)
    ]
    return found, rows


def summarise(
    out: Path,
    judged: reward_model.Evaluation,
    found: dict[str, PolicyEvaluation],
    ceiling: float,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    trained = json.loads((out / "reward" / "summary.json").read_text(encoding="utf-8"))
    return {
        "reward_model": {
            "pairs": trained["pairs"],
            "accuracy": judged.accuracy,
            "ceiling": ceiling,
            "held_out_pairs": judged.pairs,
            "calibration_error": judged.calibration_error,
            "calibration_bins": [list(row) for row in judged.bins],
        },
        "methods": {
            name: {
                "gold_reward": one.rewards[GOLD],
                "gold_ci95": one.reward_ci95,
                "proxy_reward": one.rewards[PROXY],
                "kl": one.kl,
                "win_rate": one.win_rate,
                "mean_length": one.mean_length,
                "distinct_2": one.distinct_2,
                "seconds": seconds[name],
            }
            for name, one in found.items()
        },
    }


def show(summary: dict[str, Any]) -> None:
    """The table on the terminal."""
    judge = summary["reward_model"]
    table = Table(title="held-out prompts", title_justify="left")
    columns = ("method", "gold reward", "proxy reward", "KL (nats)", "wins vs base", "length", "distinct-2", "seconds")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, row in summary["methods"].items():
        table.add_row(
            name.replace("_", " "),
            f"{row['gold_reward']:+.3f} ± {row['gold_ci95']:.3f}",
            f"{row['proxy_reward']:+.2f}",
            f"{row['kl']:.1f}",
            f"{row['win_rate']:.0%}",
            f"{row['mean_length']:.1f}",
            f"{row['distinct_2']:.2f}",
            f"{row['seconds']:.0f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(
        f"reward model: {judge['accuracy']:.1%} of {judge['held_out_pairs']} held-out choices predicted, after "
        f"{judge['pairs']} pairs; the noise in the choices allows {judge['ceiling']:.1%}"
    )


def main(command: config.Quickstart) -> None:
    quickstart(Path(command.out), Settings(seed=command.seed), overwrite=command.overwrite)
