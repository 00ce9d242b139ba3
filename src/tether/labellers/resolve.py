"""From a ``--labeller`` value to a labeller.

A value is ``gold:REWARD``, ``command:PROGRAM ARGUMENTS``, ``judge:file.yaml``, ``file.py:function`` or
``module:function``. The source of its labels is the value.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import RewardError
from tether.labellers.function import FunctionLabeller
from tether.labellers.labels import Labeller
from tether.labellers.program import ProgramLabeller
from tether.labellers.scores import GoldLabeller, JudgeLabeller
from tether.rewards.client import Requests
from tether.rewards.loading import load_function
from tether.rewards.resolve import judge_file, judge_reward, resolve_scorer, short_name
from tether.untrusted import printable

FORMS = "gold:REWARD, 'command:PROGRAM ARGUMENTS', judge:file.yaml, file.py:function and module:function"


def resolve_labeller(
    spec: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    noise: float,
    seed: int,
    deadline: float,
    retries: int,
    requests: Requests,
) -> Labeller:
    """The labeller behind ``spec``; a reward is loaded in the dtype and on the device of ``model``, the policy.

    ``deadline`` (seconds), ``retries`` and ``requests`` are as for rewards. Raises :class:`RewardError`.
    """
    name = printable(spec)
    kind, _, rest = spec.partition(":")
    if kind == "gold":
        score = resolve_scorer(
            [rest],
            tokenizer,
            dtype=model.dtype,
            device=model.device,
            deadline=deadline,
            retries=retries,
            requests=requests,
        )
        return GoldLabeller(name=name, score=score, seed=seed, temperature=temperature, noise=noise)
    if kind == "command":
        return ProgramLabeller(name=name, arguments=arguments_of(rest, spec), deadline=deadline, retries=retries)
    if file := judge_file(spec):
        judge = judge_reward(short_name(spec), Path(file), deadline=deadline, requests=requests)
        return JudgeLabeller(name=name, judge=judge)
    if not rest:
        raise RewardError("no such labeller", where=spec, hint=f"the forms are {FORMS}")
    loaded = load_function(spec, deadline=deadline, retries=retries)
    return FunctionLabeller(name=name, function=loaded.function, deadline=deadline, retries=retries, apart=loaded.apart)


def arguments_of(line: str, spec: str) -> tuple[str, ...]:
    """A command line as its words. Raises :class:`RewardError`."""
    try:
        found = tuple(shlex.split(line))
    except ValueError as error:
        raise RewardError(f"the command cannot be split into words ({error})", where=spec) from None
    if not found:
        raise RewardError("no program after command:", where=spec)
    return found
