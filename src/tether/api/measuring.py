"""Sampling, scoring and comparing in one call each: ``tether.generate``, ``tether.score``, ``tether.evaluate``."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.api.arguments import Parameter, describe, filled, named_as_arguments, parameters_of, require_known
from tether.api.parameters import IN_MEMORY, OBJECTS, Model, located
from tether.api.rewards import name_of, rewards_of
from tether.config import DeviceOptions, SampleOptions
from tether.data.records import load_demonstrations, load_prompts
from tether.environments.loading import Make
from tether.errors import DataError
from tether.evaluation import PolicyEvaluation, evaluate_policy, require_comparable
from tether.flags import options_of
from tether.generation.engine import Engine
from tether.looking.evaluate import evaluation_kl, evaluation_samples, require_one_vocabulary
from tether.models.checks import check_policy
from tether.models.linear import has_rounded_matmuls
from tether.models.loading import check_tokenizer, load_tokenizer
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum
from tether.rewards.resolve import resolve_scorer
from tether.statistics import Estimate, known, mean_difference, mean_interval, mean_score, share_interval, win_share
from tether.training.given import described
from tether.training.loading import episodes_of, load_model, load_prompts_of, with_episodes
from tether.types import (
    Completion,
    FinishReason,
    Prompt,
    RolloutGroup,
    Score,
    ScoredGroup,
    make_requests,
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A policy beside its reference, on the same prompts with the same seeds. Intervals are over prompts, at 95%."""

    policy: PolicyEvaluation
    reference: PolicyEvaluation
    reward: Estimate
    """Mean score of the policy."""
    difference: Estimate
    """Mean score of the policy minus that of the reference, prompt by prompt."""
    win_rate: Estimate
    """Share of completions that score above the reference's with the same seed; ties count half."""
    kl: float
    """KL(policy || reference), nats per completion."""
    groups: tuple[ScoredGroup, ...] = field(repr=False)
    """What the policy wrote, with its scores."""
    reference_groups: tuple[ScoredGroup, ...] = field(repr=False)
    """What the reference wrote."""

    def __str__(self) -> str:
        return "\n".join(f"{name:12} {value}" for name, value in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        named = {"reward": self.reward, "difference": self.difference, "win rate": self.win_rate}
        lines = [(name, f"{one.value:.3f}  [{one.low:.3f}, {one.high:.3f}]") for name, one in named.items()]
        return [*lines, ("KL", f"{self.kl:.3f} nats per completion"), ("prompts", str(self.policy.prompts))]

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._lines())
        return f"<table>{''.join(rows)}</table>"


def generate(model: Model, prompts: Any, **arguments: Any) -> list[RolloutGroup]:
    """Sample completions of ``prompts``: one group per prompt, in their order."""
    tokenizer, options, objects = _options(arguments)
    with named_as_arguments(list(options_of(SampleOptions)), {}, again=""):
        loaded, tokenizer = policy_of(model, tokenizer, options.device)
        found = load_prompts_of(prompts, loaded, tokenizer, data=options.data, sampling=options.sampling)
        asked = make_requests(found, group_size=options.group_size, seed=options.seed)
        episodes = episodes_of(options.environment, objects=objects)
        engine = Engine(loaded, tokenizer, budget=options.budget, episodes=episodes)
        return engine.generate(asked, sampling=options.sampling)


def evaluate(policy: Model, reference: Model, prompts: Any, rewards: Any = (), **arguments: Any) -> Evaluation:
    """Compare a policy with its reference on ``prompts``: reward, difference, win rate and KL, with intervals.

    ``rewards`` may be empty where there is an ``env``.
    """
    tokenizer, options, objects = _options(arguments)
    with named_as_arguments(list(options_of(SampleOptions)), {"reward": "rewards"}, again=""):
        model, tokenizer = policy_of(policy, tokenizer, options.device)
        other, own = policy_of(reference, tokenizer, options.device, argument="reference")
        require_one_vocabulary(tokenizer, own, where="reference")
        found = load_prompts_of(prompts, model, tokenizer, data=options.data, sampling=options.sampling)
        limit = options.sampling.max_new_tokens
        require_comparable(model, other, found, max_new_tokens=limit, where="reference")
        episodes = episodes_of(options.environment, objects=objects)
        others = None if episodes and not rewards else _scorer(rewards, tokenizer, model)
        scorer = with_episodes(others, episodes, weight=options.environment.env_weight)
        scorer = prepared(scorer, {"prompts": found}, max_new_tokens=limit)
        groups, against = (
            evaluation_samples(one, tokenizer, scorer, found, options, episodes) for one in (model, other)
        )
        kl = float(evaluation_kl(groups, model, other, options.sampling).mean())
        return _compared(groups, against, kl)


def _compared(groups: list[ScoredGroup], against: list[ScoredGroup], kl: float) -> Evaluation:
    """The figures of both, and what lies between them."""
    policy, reference = evaluate_policy(groups, against, kl=kl), evaluate_policy(against, against, kl=0.0)
    own, rivals = ([[score.total for score in group.scores] for group in one] for one in (groups, against))
    pairs = list(zip(own, rivals, strict=True))
    return Evaluation(
        policy=policy,
        reference=reference,
        reward=mean_interval(known(mean_score(row) for row in own)),
        difference=mean_interval(known(mean_difference(row, rival) for row, rival in pairs)),
        win_rate=share_interval(known(win_share(row, rival, same_seeds=True) for row, rival in pairs)),
        kl=kl,
        groups=tuple(groups),
        reference_groups=tuple(against),
    )


def score(
    rewards: Any,
    prompts: Any,
    completions: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | str = "base",
    context: int = 2**31,
) -> list[Score]:
    """What ``rewards`` say of ``completions``, one per prompt: to try a reward before a run.

    ``prompts`` and ``rewards`` are those of a training command. The ids that a reward may read are those of
    ``tokenizer``, or of the tokenizer of the model with this name; a completion ends in its EOS. Raises
    :class:`DataError` where there are not as many completions as prompts, or one of them is empty.
    """
    with named_as_arguments([], {"reward": "rewards"}, again=""):
        own = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        found = load_prompts(prompts, own, context=context, max_new_tokens=1)
        if len(found) != len(completions):
            raise DataError(f"{len(completions)} completions for {len(found)} prompts", where="completions")
        rows = [
            {"prompt": list(prompt.messages) if prompt.messages else prompt.text, "completion": _turn(prompt, text)}
            for prompt, text in zip(found, completions, strict=True)
        ]
        ids = load_demonstrations(rows, own, context=context)
        groups = [
            RolloutGroup(
                prompt=prompt,
                completions=(
                    Completion(
                        ids=one.completion_ids,
                        mask=(True,) * len(one.completion_ids),
                        sampler_logp=(0.0,) * len(one.completion_ids),
                        finish_reason=FinishReason.EOS,
                        text=text,
                        weights_version=0,
                    ),
                ),
            )
            for prompt, one, text in zip(found, ids, completions, strict=True)
        ]
        scorer = prepared(_scorer(rewards, own, None), {"prompts": found}, max_new_tokens=1)
        return [group.scores[0] for group in scorer.score(groups)]


def _turn(prompt: Prompt, text: str) -> Any:
    return [{"role": "assistant", "content": text}] if prompt.messages else text


def _scorer(rewards: Any, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> WeightedSum:
    """The rewards as one scorer; reward models are where ``model`` is, in its precision, with products rounded as its
    are."""
    found = rewards_of(rewards)
    place: dict[str, Any] = {}
    if model is not None:
        place = {"dtype": model.dtype, "device": model.device, "rounded": has_rounded_matmuls(model)}
    return resolve_scorer(found.specs, tokenizer, objects=found.objects, **place)


def policy_of(
    given: Model, tokenizer: PreTrainedTokenizerBase | None, device: DeviceOptions, *, argument: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer. One in memory stays where it is and in its precision, and is set to evaluation mode;
    the ``tokenizer`` is its."""
    found = located(given, tokenizer, argument=argument)
    if isinstance(found, str):
        model, own, _ = load_model(found, device)
        return model, own
    model, own = found
    model.train(False)
    check_tokenizer(argument, own, model)
    check_policy(argument, model)
    return model, own


def _options(
    arguments: Mapping[str, Any],
) -> tuple[PreTrainedTokenizerBase | None, SampleOptions, Mapping[str, Make]]:
    """The tokenizer, if one is given, the options, and an environment that is a Python object."""
    options = list(options_of(SampleOptions))
    require_known(list(arguments), [*(option.name for option in options), "tokenizer"], {})
    values = {name: value for name, value in arguments.items() if name != "tokenizer"}
    objects: dict[str, Make] = {}
    if callable(env := values.get("env")):
        values["env"] = described(f"env {name_of(env)}")
        objects[values["env"]] = env
    return arguments.get("tokenizer"), filled(SampleOptions, options, values), objects


def _documented(function: Callable[..., Any], returns: Any, **about: str) -> None:
    """The signature and docstring of a function of ``about`` and the options."""
    first = [Parameter(name=name, annotation=Any, help=text, title="Arguments") for name, text in about.items()]
    tokenizer = Parameter(
        name="tokenizer",
        annotation=PreTrainedTokenizerBase | None,
        default=None,
        help="The tokenizer of a model in memory.",
        title="Arguments",
    )
    options = parameters_of(list(options_of(SampleOptions)), SampleOptions, title="Arguments")
    describe(function, [*first, tokenizer, *options], doc=function.__doc__ or "", returns=returns, first=list(about))


MODEL = "A directory, a hub id or 'base', a model in memory, or a tether.Run."
_documented(generate, list[RolloutGroup], model=MODEL, prompts=IN_MEMORY)
_documented(evaluate, Evaluation, policy=MODEL, reference=MODEL, prompts=IN_MEMORY, rewards=OBJECTS)
