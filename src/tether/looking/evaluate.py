"""``tether eval``: measure policies on prompts, or a reward model on pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.console import RenderableType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import RewardCalls, SampleOptions
from tether.errors import ConfigError
from tether.evaluation import completion_kl, require_comparable, sample_and_score
from tether.generation.engine import Engine
from tether.generation.episodes import Episodes
from tether.looking import best_of_n, judges
from tether.looking.policy_figures import Attempts, Sampled, measured, pairs
from tether.looking.policy_tables import as_data, in_full
from tether.looking.terminal import rendered, show
from tether.models.reference import FrozenCopy
from tether.rewards.checks import prepared
from tether.rewards.resolve import resolve_scorer
from tether.runtime.json_text import to_json
from tether.seeds import derive_seed
from tether.training.common import EVAL_SEED
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import episodes_of, load_model, load_prompts_of, with_episodes
from tether.types import Prompt, Sampling, ScoredGroup, Scorer


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure policies on prompts, or a reward model on pairs: tables on a terminal, and elsewhere one JSON object."""

    model: tuple[str, ...] = ()
    """Policy to measure: a directory, a hub id or 'base'. Several are compared on the same prompts with the same
    seeds; repeatable."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: tuple[str, ...] = ()
    """Reward of the completions, as in training."""
    reference: str | None = None
    """Model to measure the KL and the win rate against; neither is reported unless given."""
    attempts: Attempts = field(default_factory=Attempts)
    reward_model: tuple[str, ...] = ()
    """Reward model to measure, instead of a policy. Several are compared on the same pairs; repeatable."""
    pairs: str | None = None
    """Rows with chosen and rejected, for a reward model."""
    format: Literal["pairs", "best-of-n"] = "pairs"
    """What a row of pairs is: two sides; or best-of-n, a prompt with lists of chosen and rejected answers, as in
    RewardBench 2."""
    by: str | None = None
    """Column of the pairs: report the accuracy of the reward model for each of its values too."""
    json: bool = False
    """Print JSON on a terminal too."""
    calls: RewardCalls = field(default_factory=RewardCalls)
    samples: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        policy = (self.model, self.prompts, self.reward, self.reference)
        judge, env = (self.reward_model, self.pairs), self.samples.environment.env
        twice = [name for names in (self.model, self.reward_model) for name in names if names.count(name) > 1]
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "give --model, --prompts and --reward or --env to measure a policy, or --reward-model and --pairs": (
                    all(policy[:2]) and bool(self.reward or env) and not any(judge)
                )
                or (all(judge) and not any(policy) and not env),
                "format is for a reward model: give --reward-model and --pairs": self.format == "pairs"
                or bool(self.reward_model),
                "pass_at and majority_at are for policies: give --model, --prompts and --reward": bool(self.model)
                or not (self.attempts.pass_at or self.attempts.majority_at),
                "majority_at compares final answers, and an episode of an env has none: leave it out": not env
                or not self.attempts.majority_at,
                "by is for rows of two sides: give --reward-model and --pairs": self.by is None
                or (bool(self.reward_model) and self.format == "pairs"),
                "format best-of-n takes one --reward-model": self.format == "pairs" or len(self.reward_model) < 2,
                f"give each model once, and {''.join(twice[:1])} is given twice": not twice,
            },
        )
        self.attempts.require_samples(self.samples.group_size, self.samples.sampling.temperature)


@naming_the_model_of_a_run()
def evaluate(command: Eval) -> None:
    if command.prompts is not None:
        data, tables = measured_policies(command, command.prompts)
    elif command.pairs is not None and command.format == "best-of-n":
        data, tables = best_of_n.measured(command.reward_model[0], command.pairs, command.samples), None
    else:
        assert command.pairs is not None
        data, tables = measured_judges(command, command.pairs)
    as_tables = tables is not None and sys.stdout.isatty() and not command.json
    show(rendered(*tables) if tables is not None and as_tables else to_json(data, indent=2, ascii_only=True))


Said = tuple[dict[str, Any], list[RenderableType]]
"""What is found, as JSON and as tables."""


def measured_judges(command: Eval, source: str) -> Said:
    """What ``tether eval`` says of reward models."""
    seed, by = derive_seed(command.samples.seed, EVAL_SEED), command.by
    models = [judges.judged(name, source, command.samples, by=by) for name in command.reward_model]
    found = [judges.measured(one, seed=seed) for one in models]
    beside = judges.comparisons(models, seed=seed)
    return judges.as_data(found, beside, by=by), judges.in_full(found, beside, by=by)


def measured_policies(command: Eval, source: str) -> Said:
    """What ``tether eval`` says of policies."""
    options, name = command.samples, command.reference
    models, reference = sampled_policies(command, source)
    seed, curve = derive_seed(options.seed, EVAL_SEED), options.sampling.temperature > 0
    found = [measured(one, reference, attempts=command.attempts, curve=curve, seed=seed) for one in models]
    beside = pairs(models, seed=seed)
    return as_data(found, beside, reference=name), in_full(found, beside, reference=name)


def sampled_policies(
    command: Eval, source: str, *, most: int | None = None
) -> tuple[list[Sampled], list[ScoredGroup] | None]:
    """What each policy writes to the prompts of ``source``, or to the first ``most`` of them, and what the reference
    does, if there is one.

    The first policy decides how prompts are read and where scores are computed. No two policies are in memory at once.
    """
    options, limit = command.samples, command.samples.sampling.max_new_tokens
    first, *others = command.model
    model, tokenizer, matmul_dtype = load_model(first, options.device)
    rounded = matmul_dtype == "bfloat16"
    place: dict[str, Any] = {"dtype": model.dtype, "device": model.device, "rounded": rounded}
    calls = command.calls.supervision
    rewards = resolve_scorer(command.reward, tokenizer, **place, **calls) if command.reward else None
    prompts = load_prompts_of(source, model, tokenizer, data=options.data, sampling=options.sampling)[:most]
    episodes = episodes_of(options.environment)
    score = with_episodes(rewards, episodes, weight=options.environment.env_weight)
    score = prepared(score, {source: prompts}, max_new_tokens=limit)
    device, reference = replace(options.device, matmul_dtype=matmul_dtype), None
    if command.reference is not None:
        where = f"--reference {command.reference}"
        reference, own, _ = load_model(command.reference, device)
        require_one_vocabulary(tokenizer, own, where=where)
        require_comparable(model, reference, prompts, max_new_tokens=limit, where=where)
    found = []
    for name in command.model:
        if name in others:
            del model
            model, own, _ = load_model(name, device)
            require_one_vocabulary(tokenizer, own, where=f"--model {name}", of=f"that of {first}")
            read = load_prompts_of(source, model, own, data=options.data, sampling=options.sampling)[:most]
            require_same_prompts(prompts, read, where=f"--model {name}", of=first)
            if reference is not None:
                where = f"--reference {command.reference}, of {name}"
                require_comparable(model, reference, prompts, max_new_tokens=limit, where=where)
        groups = evaluation_samples(model, tokenizer, score, prompts, options, episodes)
        kl = None if reference is None else evaluation_kl(groups, model, reference, options.sampling)
        found.append(Sampled(name=name, groups=groups, kl=kl))
    if reference is None:
        return found, None
    return found, evaluation_samples(reference, tokenizer, score, prompts, options, episodes)


def require_same_prompts(prompts: Sequence[Prompt], read: Sequence[Prompt], *, where: str, of: str) -> None:
    """Raise :class:`ConfigError` unless the prompts that the model at ``where`` reads are those of the model ``of``."""
    if [one.ids for one in read] != [one.ids for one in prompts]:
        raise ConfigError(
            f"it reads the prompts as other tokens than {of}, or leaves out others",
            where=where,
            hint="give both one --chat-template, and prompts that fit into both contexts",
        )


def require_one_vocabulary(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, *, where: str, of: str = "the policy's"
) -> None:
    """Raise :class:`ConfigError` unless ``own``, the tokenizer at ``where``, is the ``tokenizer``, which is ``of``."""
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"its tokenizer is not {of}, so the two cannot be compared token by token", where=where)


def evaluation_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    prompts: Sequence[Prompt],
    options: SampleOptions,
    episodes: Episodes | None = None,
) -> list[ScoredGroup]:
    """What a model writes to ``prompts``, scored: with the seeds of every evaluation with these ``options``."""
    return sample_and_score(
        Engine(model, tokenizer, budget=options.budget, episodes=episodes),
        score,
        prompts,
        group_size=options.group_size,
        sampling=options.sampling,
        seed=derive_seed(options.seed, EVAL_SEED),
    )


def evaluation_kl(
    groups: Sequence[ScoredGroup], policy: PreTrainedModel, reference: PreTrainedModel, sampling: Sampling
) -> Tensor:
    """KL(policy || reference) of each of the policy's completions, [B] nats; of greedy ones, at temperature 1."""
    return completion_kl(
        groups, policy=policy, reference=FrozenCopy(reference), temperature=sampling.temperature or 1.0
    )
