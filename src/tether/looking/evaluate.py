"""``tether eval``: measure a policy on prompts, or a reward model on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.algorithms import reward_model
from tether.config import RewardCalls, SampleOptions
from tether.data.checks import DataReport
from tether.data.records import load_pairs
from tether.errors import ConfigError
from tether.evaluation import evaluate_policy, policy_kl, require_comparable, sample_and_score
from tether.generation.engine import Engine
from tether.generation.episodes import Episodes
from tether.looking import best_of_n
from tether.looking.terminal import show
from tether.models.reference import FrozenCopy
from tether.models.reward import load_reward_model
from tether.rewards.checks import prepared
from tether.rewards.resolve import resolve_scorer
from tether.runtime.json_text import to_json
from tether.seeds import derive_seed
from tether.training.common import EVAL_SEED
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import (
    episodes_of,
    load_model,
    load_prompts_of,
    placing,
    reader,
    set_matmul_dtype,
    tell_unpacked,
    with_episodes,
)
from tether.types import Prompt, Sampling, ScoredGroup, Scorer


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a policy on prompts, or a reward model on pairs; the result is one JSON object."""

    model: str | None = None
    """Policy to measure: a directory, a hub id or 'base'."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: tuple[str, ...] = ()
    """Reward of the completions, as in training."""
    reference: str | None = None
    """Model to measure the KL and the win rate against; neither is reported unless given."""
    reward_model: str | None = None
    """Reward model to measure, instead of a policy."""
    pairs: str | None = None
    """Rows with chosen and rejected, for a reward model."""
    format: Literal["pairs", "best-of-n"] = "pairs"
    """What a row of pairs is: two sides; or best-of-n, a prompt with lists of chosen and rejected answers, as in
    RewardBench 2."""
    calls: RewardCalls = field(default_factory=RewardCalls)
    samples: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        policy = (self.model, self.prompts, self.reward, self.reference)
        judge, env = (self.reward_model, self.pairs), self.samples.environment.env
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
            },
        )


@naming_the_model_of_a_run()
def evaluate(command: Eval) -> None:
    if command.reward_model is not None and command.pairs is not None:
        measure = best_of_n.measured if command.format == "best-of-n" else measured_judge
        found = measure(command.reward_model, command.pairs, command.samples)
    else:
        assert command.model is not None
        assert command.prompts is not None
        found = measured_policy(command, command.model, command.prompts)
    show(to_json(found, indent=2, ascii_only=True))


def measured_judge(name: str, source: str, options: SampleOptions) -> dict[str, object]:
    """What ``tether eval`` says of a reward model."""
    device, report = options.device, DataReport()
    judge, tokenizer = load_reward_model(name, **placing(device))
    tell_unpacked(judge)
    set_matmul_dtype(device.matmul_dtype, judge)
    pairs = reader(load_pairs, judge, tokenizer, options.data, report)(source)
    report.tell()
    return {"reward_model": name, **vars(reward_model.evaluate(judge, pairs, token_budget=16384))}


def measured_policy(command: Eval, name: str, source: str) -> dict[str, object]:
    """What ``tether eval`` says of a policy."""
    options, limit = command.samples, command.samples.sampling.max_new_tokens
    model, tokenizer, matmul_dtype = load_model(name, options.device)
    rounded = matmul_dtype == "bfloat16"
    place: dict[str, Any] = {"dtype": model.dtype, "device": model.device, "rounded": rounded}
    calls = command.calls.supervision
    rewards = resolve_scorer(command.reward, tokenizer, **place, **calls) if command.reward else None
    prompts = load_prompts_of(source, model, tokenizer, data=options.data, sampling=options.sampling)
    episodes = episodes_of(options.environment)
    score = with_episodes(rewards, episodes, weight=options.environment.env_weight)
    score = prepared(score, {source: prompts}, max_new_tokens=limit)
    if command.reference is None:
        groups = evaluation_samples(model, tokenizer, score, prompts, options, episodes)
        found = evaluate_policy(groups, groups, kl=0.0).as_dict()
        found = {key: value for key, value in found.items() if key not in ("kl", "win_rate")}
        return {"model": name, "reference": None, **found}
    device, where = replace(options.device, matmul_dtype=matmul_dtype), f"--reference {command.reference}"
    reference, own, _ = load_model(command.reference, device)
    require_one_vocabulary(tokenizer, own, where=where)
    require_comparable(model, reference, prompts, max_new_tokens=limit, where=where)
    groups, against = (
        evaluation_samples(one, tokenizer, score, prompts, options, episodes) for one in (model, reference)
    )
    kl = evaluation_kl(groups, model, reference, options.sampling)
    return {"model": name, "reference": command.reference, **evaluate_policy(groups, against, kl=kl).as_dict()}


def require_one_vocabulary(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, *, where: str) -> None:
    """Raise :class:`ConfigError` unless ``own``, the tokenizer of the reference at ``where``, is the policy's."""
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError("its tokenizer is not the policy's, so there is no KL between them", where=where)


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
) -> float:
    """KL(policy || reference) of the policy's ``groups``, nats per completion; of greedy ones, at temperature 1."""
    return policy_kl(groups, policy=policy, reference=FrozenCopy(reference), temperature=sampling.temperature or 1.0)
