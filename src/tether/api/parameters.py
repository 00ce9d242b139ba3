"""The keyword arguments of a training command: its options, and what only Python can give."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.algorithms.optimise import OptimizerFactory
from tether.api.arguments import Parameter, parameters_of
from tether.api.result import Run
from tether.api.rewards import RewardLike
from tether.errors import ConfigError
from tether.flags import options_of
from tether.generation.environment import Environment
from tether.observers import Hook, Monitor

Source = str | os.PathLike[str] | Sequence[Any] | Mapping[str, Sequence[Any]]
"""A file, a directory or a hub id; or rows in memory (:func:`tether.data.memory.source_of`)."""
Model = str | os.PathLike[str] | PreTrainedModel | Run
"""A directory, a hub id or 'base'; a model in memory; or a run."""

COLUMNS: Mapping[str, tuple[str, str]] = {
    "prompts": ("prompt", "prompt"),
    "eval_prompts": ("prompt", "prompt"),
    "data": ("text", "messages"),
    "eval_data": ("text", "messages"),
    "pairs": ("", ""),
    "eval_pairs": ("", ""),
    "test_pairs": ("", ""),
}
"""The options that are rows: the column of a row that is a string, and of one that is a conversation."""
REWARDS: Mapping[str, str] = {"reward": "rewards", "eval_reward": "eval_rewards"}
"""The options that are rewards, and what they are called here."""
IN_MEMORY = "A file, a hub id, or in memory: a list, a dict of lists, a DataFrame, a Dataset."
OBJECTS = (
    "A function over lists of completions, a text as of --reward, or a list of these; each may be (reward, weight). A "
    "dict names them."
)
EXTRAS: Sequence[Parameter] = (
    Parameter(
        name="tokenizer",
        annotation=PreTrainedTokenizerBase | None,
        default=None,
        help="The tokenizer of a model in memory.",
        title="Python",
    ),
    Parameter(
        name="on_step",
        annotation=Hook | Sequence[Hook],
        default=(),
        help="A function, or several, called with a tether.StepRecord after each step; a tether.Stop that it returns "
        "ends the run.",
        title="Python",
    ),
    Parameter(
        name="monitors",
        annotation=Sequence[Monitor],
        default=(),
        help="Objects that watch the steps, with a state that checkpoints hold: tether.Monitor.",
        title="Python",
    ),
    Parameter(
        name="optimizer",
        annotation=Optimizer | OptimizerFactory | None,
        default=None,
        help="In place of AdamW: a torch optimizer, its class, or a function that makes one of parameter groups. Its "
        "learning rate is the peak of lr_schedule.",
        title="Python",
    ),
    Parameter(
        name="resume",
        annotation=bool,
        default=False,
        help="Resume the interrupted run in out; the arguments are those that it was begun with.",
        title="Python",
    ),
    Parameter(
        name="allow",
        annotation=bool,
        default=False,
        help="With resume: accept options that differ from the run's where a change is safe, such as steps.",
        title="Python",
    ),
)
"""What only Python has."""


def located(
    given: Model, tokenizer: PreTrainedTokenizerBase | None, *, argument: str
) -> str | tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The directory or the name of a model, or one in memory with its ``tokenizer``. Raises :class:`ConfigError` where
    that has none, or ``given`` is no model."""
    if isinstance(given, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer", where=argument, hint="give tokenizer=")
        return given, tokenizer
    name = given.model_path if isinstance(given, Run) else given
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"found {type(given).__name__}", where=argument, hint="give a directory, a hub id or a model")
    return os.fspath(name)


def parameters(cls: type) -> list[Parameter]:
    """The keyword arguments for a command with the options ``cls``."""
    found = [_in_python(one) for one in parameters_of(list(options_of(cls)), cls, title="Arguments")]
    needed = [one for one in found if one.default is inspect.Parameter.empty]
    return [*needed, *(one for one in found if one not in needed), *EXTRAS]


def _in_python(one: Parameter) -> Parameter:
    """The argument of an option that Python gives in more ways."""
    changes: dict[str, Any] = {}
    if one.name == "model":
        changes = {"annotation": Model, "help": f"{one.help[:-1]}, or a model in memory, of which a copy is trained."}
    elif one.name in COLUMNS:
        changes = {"annotation": Source, "help": f"{one.help.split(': a file')[0].rstrip('.')}. {IN_MEMORY}"}
    elif one.name in REWARDS:
        objects = RewardLike | Sequence[Any] | Mapping[str, Any]
        about = "Reward." if one.name == "reward" else one.help.split(": as --reward")[0] + "."
        changes = {"name": REWARDS[one.name], "annotation": objects, "help": f"{about} {OBJECTS}"}
    elif one.name == "env":
        changes = {
            "annotation": str | Callable[[], Environment],
            "help": f"{one.help} Or a class, or a function that makes one.",
        }
    elif one.name == "out":
        changes = {
            "annotation": str | os.PathLike[str] | None,
            "default": None,
            "help": f"{one.help} Unless given, a temporary one, removed with the result.",
        }
    if "annotation" in changes and one.default is None:
        changes["annotation"] = changes["annotation"] | None
    return Parameter(**{**vars(one), **changes})
