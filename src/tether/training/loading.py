"""Models and rows of data as the options say, for training and for what looks at models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.config import DataOptions, DeviceOptions, EnvironmentOptions
from tether.data.chat import choose_template
from tether.data.checks import DataReport
from tether.data.records import load_prompts
from tether.environments.generated import made
from tether.environments.loading import Make, load_environment
from tether.errors import ConfigError
from tether.generation.episodes import Episodes
from tether.models.linear import round_matmuls
from tether.models.loading import context_length, embedding_rows, load_policy, unembedded
from tether.models.unpacked import unpacked_words
from tether.rewards.combine import WeightedSum, require_distinct
from tether.rewards.episode import EpisodeReward
from tether.rewards.loading import Sources
from tether.runtime.device import Dtype, MatmulDtype, pick_device, pick_dtype, pick_matmul_dtype
from tether.types import Prompt, Sampling
from tether.untrusted import one_line

NO_OBJECTS: Mapping[str, Make] = MappingProxyType({})


def set_matmul_dtype(name: MatmulDtype, model: PreTrainedModel) -> Dtype:
    """Choose the precision that the model multiplies in, and apply it."""
    matmul_dtype = pick_matmul_dtype(name, model)
    if matmul_dtype == "bfloat16":
        round_matmuls(model)
    return matmul_dtype


def placing(device: DeviceOptions) -> dict[str, Any]:
    """What the functions that load a model are given."""
    return {
        "dtype": pick_dtype(device.dtype),
        "device": pick_device(device.device),
        "quantise": device.quantise,
    }


def tell_unpacked(model: PreTrainedModel) -> None:
    """Say on the standard error where a model is computed without sharing prompts."""
    if said := unpacked_words(model):
        print(one_line(said), file=sys.stderr)


def load_model(name: str, device: DeviceOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dtype]:
    """A policy that is not trained, with its tokenizer and the precision that it multiplies in."""
    model, tokenizer = load_policy(name, **placing(device))
    tell_unpacked(model)
    return model, tokenizer, set_matmul_dtype(device.matmul_dtype, model)


def load_prompts_of(
    source: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, data: DataOptions, sampling: Sampling
) -> list[Prompt]:
    """The prompts that a model is to continue outside of training; what was left out is reported."""
    require_room(model, sampling)
    report = DataReport()
    prompts: list[Prompt] = reader(load_prompts, model, tokenizer, data, report)(
        source, max_new_tokens=sampling.max_new_tokens
    )
    report.tell()
    return prompts


def reader(
    read: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataOptions,
    report: DataReport,
) -> Callable[..., Any]:
    """``read``, one of the loaders of :mod:`tether.data.records`, for a model and what to do with its rows; its
    tokenizer gets the chat template that is chosen for them."""
    choose_template(tokenizer, data.chat.chat_template)
    known = partial(
        read,
        tokenizer=tokenizer,
        context=context_length(model),
        overlong=data.overlong,
        on_bad_rows=data.on_bad_rows,
        report=report,
        unembedded=unembedded(tokenizer, embedding_rows(model)),
        each=data.applied,
    )
    return lambda source, **more: known(made(source), **more)


def episodes_of(
    options: EnvironmentOptions, *, directory: Path | None = None, objects: Mapping[str, Make] = NO_OBJECTS
) -> Episodes | None:
    """The episodes that completions are; None where there is no environment. Relative paths are those of
    ``directory``, by default the working directory; ``objects`` holds environments that were given in Python."""
    if options.env is None:
        return None
    sources = Sources() if directory is None else Sources(directory)
    name, make = load_environment(options.env, sources=sources, objects=objects)
    return Episodes(
        make=make,
        name=name,
        max_turns=options.max_turns,
        turn_tokens=options.turn_tokens,
        deadline=options.deadline_seconds,
        seconds=options.limit_seconds,
    )


def with_episodes(score: WeightedSum | None, episodes: Episodes | None, *, weight: float) -> WeightedSum:
    """What the environment says of an episode, and the other rewards. Raises :class:`RewardError` where there is
    neither, and where two have one name."""
    own = ((EpisodeReward(episodes.name), weight),) if episodes else ()
    others = score.rewards if score else ()
    require_distinct([reward.name for reward, _ in (*own, *others)])
    return WeightedSum((*own, *others))


def require_room(model: PreTrainedModel, sampling: Sampling) -> None:
    """Raise :class:`ConfigError` where completions alone can fill the context, so that no prompt fits."""
    context = context_length(model)
    if sampling.max_new_tokens >= context:
        raise ConfigError(
            f"max_new_tokens is {sampling.max_new_tokens}, and the model's context of {context} tokens holds the "
            "prompt too",
            hint=f"give --max-new-tokens less than {context}",
        )
