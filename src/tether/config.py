"""The options of every command, as frozen dataclasses, and how they are filled: defaults, then a YAML file, then flags.

Options are flat for the person who writes them, ``--kl-coef 0.1`` or ``kl_coef: 0.1``, and nested for the code that
owns them: an algorithm's options live in its own ``Config``. A name stands for one option in all of a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import tyro
import yaml

from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.data.records import Overlong
from tether.errors import ConfigError
from tether.runtime.device import Dtype
from tether.types import Sampling

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training run has."""

    out: str
    """The run directory; nothing is written outside it."""
    seed: int = 0
    """Decides every random choice of the run."""
    overwrite: bool = False
    """Replace the run that is in the directory."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "float32"
    """Of the weights."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves one at the end."""
    quiet: bool = False
    """No progress."""

    def __post_init__(self) -> None:
        ConfigError.unless({"save_every must be 0 or more": self.save_every >= 0})


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts, and what their completions are worth."""

    prompts: str
    """Rows with a prompt: a file or a hub id."""
    reward: Repeated = ()
    """A reward-model directory, file.py:function, module:function or a rule; =WEIGHT after it if not 1; repeatable."""
    eval_prompts: str | None = None
    """Held-out prompts to compare the model with its reference on, at the end."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context."""
    rollouts_every: int = 1
    """Steps between rollout files; 0 writes none."""

    def __post_init__(self) -> None:
        ConfigError.unless({"rollouts_every must be 0 or more": self.rollouts_every >= 0})


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How long, and how many prompts at a time."""

    steps: int = 100
    """Steps of the run: roll out, score, update."""
    prompts_per_step: int = 16
    """Prompts a step; each gets group_size completions."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "steps must be at least 1": self.steps >= 1,
                "prompts_per_step must be at least 1": self.prompts_per_step >= 1,
            }
        )


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a model on texts or on prompts with completions."""

    model: str
    """A directory, a hub id or 'base'."""
    data: str
    """Rows with text, with prompt and completion, or with messages."""
    eval_data: str | None = None
    """Held-out rows of the same kind; their loss is measured at the end of each epoch."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context."""
    run: RunOptions
    sft: sft.Config = field(default_factory=sft.Config)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model on preference pairs."""

    model: str
    """The language model to start from: a directory, a hub id or 'base'."""
    pairs: str
    """Rows with chosen and rejected, with or without prompt and margin."""
    eval_pairs: str | None = None
    """Held-out pairs; without them a share of the pairs is held out."""
    eval_share: float = 0.1
    """The share of the pairs that is held out when no eval_pairs are given."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context."""
    run: RunOptions
    reward: reward_model.Config = field(default_factory=reward_model.Config)

    def __post_init__(self) -> None:
        ConfigError.unless({"eval_share must lie between 0 and 1": 0 < self.eval_share < 1})


@dataclass(frozen=True, kw_only=True)
class RejectionSampling:
    """Sample N completions a prompt, keep the best K, fine-tune on them."""

    model: str
    """The policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    rejection_sampling: rejection_sampling.Config = field(default_factory=rejection_sampling.Config)


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Improve a policy by PPO with a value function."""

    model: str
    """The policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    ppo: ppo.Config = field(default_factory=ppo.Config)


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Improve a policy by GRPO."""

    model: str
    """The policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    grpo: grpo.Config = field(default_factory=grpo.Config)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample completions, one JSON object a line."""

    model: str
    """A directory, a hub id or 'base'."""
    prompts: str
    """Rows with a prompt: a file or a hub id."""
    out: str | None = None
    """The file to write; the terminal unless given."""
    group_size: int = 1
    """Completions a prompt."""
    seed: int = 0
    """Decides every completion."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "float32"
    """Of the weights."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        ConfigError.unless({"group_size must be at least 1": self.group_size >= 1})


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a policy on prompts, or a reward model on pairs; the result is one JSON object."""

    model: str | None = None
    """The policy: a directory, a hub id or 'base'."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: Repeated = ()
    """What the completions are worth; as in training."""
    reference: str | None = None
    """The model to measure the KL from and to win against; without it neither is reported."""
    reward_model: str | None = None
    """The reward model to measure, in place of a policy."""
    pairs: str | None = None
    """Rows with chosen and rejected, for a reward model."""
    group_size: int = 1
    """Completions a prompt."""
    seed: int = 0
    """Decides every completion."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "float32"
    """Of the weights."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        policy = self.model is not None and self.prompts is not None and bool(self.reward)
        judge = self.reward_model is not None and self.pairs is not None
        ConfigError.unless(
            {
                "give --model, --prompts and --reward to measure a policy, or --reward-model and --pairs": policy
                != judge,
                "group_size must be at least 1": self.group_size >= 1,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw a run as one HTML page."""

    directory: tyro.conf.Positional[str]
    """The run directory."""


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """All of RLHF on the embedded model, without a network: pairs, reward model, three methods, evaluation, report."""

    out: str = "quickstart"
    """The directory to write."""
    seed: int = 0
    """Decides every random choice."""
    overwrite: bool = False
    """Replace the run that is in the directory."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has, and whether tether works on it."""


Command = TypeVar("Command")


@dataclass(frozen=True)
class Option:
    """One flat option: its name, the path of fields that leads to it, and its type."""

    name: str
    path: tuple[str, ...]
    type: Any


def options_of(cls: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every option of a command, flat."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(typing.cast(type, hint), (*path, entry.name))
        else:
            yield Option(entry.name, (*path, entry.name), hint)


def flatten(command: Any) -> dict[str, Any]:
    """A filled command as flat, plain data, for ``config.yaml``."""
    flat: dict[str, Any] = {}
    for option in options_of(type(command)):
        value = command
        for name in option.path:
            value = getattr(value, name)
        flat[option.name] = list(value) if isinstance(value, tuple) else value
    return flat


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean X?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_yaml(path: str, cls: type) -> dict[str, Any]:
    """The flat options of a YAML file, names checked and values coerced to their types."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(loaded or {}, Mapping):
        raise ConfigError(f"{path}: must hold options as 'name: value' lines")
    known = {option.name: option for option in options_of(cls)}
    values: dict[str, Any] = {}
    for key, value in (loaded or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown option {key!r}{nearest(name, list(known))}")
        if known[name].type is Repeated and isinstance(value, str):
            value = [value]
        try:
            values[name] = pydantic.TypeAdapter(known[name].type).validate_python(value)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{path}: {key}: {error.errors()[0]['msg']}, found {value!r}") from None
    return values


def build(cls: type[Command], values: Mapping[str, Any], *, missing: Any = dataclasses.MISSING) -> Command:
    """A command from flat ``values``, with defaults for the others; required ones that lack become ``missing``."""

    def make(cls: type, default: Any) -> Any:
        hints = typing.get_type_hints(cls, include_extras=True)
        arguments = {}
        for entry in dataclasses.fields(cls):
            hint = hints[entry.name]
            fallback = getattr(default, entry.name, dataclasses.MISSING) if default is not None else _default(entry)
            if dataclasses.is_dataclass(hint):
                nested = None if fallback is dataclasses.MISSING else fallback
                arguments[entry.name] = make(typing.cast(type, hint), nested)
            elif entry.name in values:
                arguments[entry.name] = values[entry.name]
            elif fallback is not dataclasses.MISSING:
                arguments[entry.name] = fallback
            elif missing is not dataclasses.MISSING:
                arguments[entry.name] = missing
            else:
                raise ConfigError(f"option {entry.name} is missing")
        return cls(**arguments)

    return typing.cast(Command, make(cls, None))


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def parse(name: str, cls: type[Command], arguments: Sequence[str]) -> Command:
    """A command from its command line: defaults, then ``--config FILE``, then flags.

    Anything wrong is one line in a :class:`ConfigError`. ``--help`` prints and exits with 0.
    """
    arguments = list(arguments)
    values: dict[str, Any] = {}
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ConfigError("--config needs a file")
        values = read_yaml(arguments[at + 1], cls)
        del arguments[at : at + 2]
    known = [f"--{option.name.replace('_', '-')}" for option in options_of(cls)]
    for argument in arguments:
        flag = argument.split("=")[0]
        plain = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else flag
        if flag.startswith("--") and plain.replace("_", "-") not in [*known, "--help"]:
            raise ConfigError(f"unknown option {flag}{nearest(flag, known)}")
    if any(argument.split("=")[0] == "--reward" for argument in arguments):
        values.pop("reward", None)  # flags replace the file's rewards rather than add to them
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                cls,
                prog=f"tether {name}",
                args=arguments,
                default=build(cls, values, missing=tyro.MISSING),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(one_line(captured.getvalue())) from None


def one_line(box: str) -> str:
    """The message inside the box that the parser draws, up to its first rule, on one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()[1:-1]]
    until = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    return " ".join(line for line in lines[:until] if line) or box.strip()


def require_rewards(task: PromptOptions) -> None:
    """Rewards can come from the file or from flags, so that they are given is checked once both are read."""
    if not task.reward:
        raise ConfigError(
            "--reward is missing: give a reward-model directory, file.py:function, module:function or a rule's name"
        )
