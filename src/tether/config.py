"""Options that several commands share, as frozen dataclasses; :mod:`tether.flags` fills them from files and flags."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tether.data.chat import Chat, as_turns
from tether.data.checks import OnBadRows
from tether.data.columns import parse_columns, renamed
from tether.data.reading import Row
from tether.data.records import Overlong
from tether.durations import seconds
from tether.errors import ConfigError
from tether.models.adapters import Lora
from tether.models.quantised import Quantise
from tether.monitor.usual import actions
from tether.names import metric_and_sign
from tether.rewards.client import Requests
from tether.runtime.device import Dtype, MatmulDtype
from tether.trackers.names import TrackerName
from tether.types import Budget, Sampling


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The device."""

    device: str = "auto"
    """Where models are: cpu, cuda or cuda:N; auto takes CUDA where there is one."""
    dtype: Dtype = "float32"
    """Precision of the weights."""
    matmul_dtype: MatmulDtype = "auto"
    """Precision in which float32 weights are multiplied: bfloat16 rounds the operands only; auto takes the faster."""
    quantise: Quantise = "none"
    """Load the weights of linear layers in 4 or 8 bits (bitsandbytes); only an adapter can be trained on them."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Rows of data."""

    overlong: Overlong = "fail"
    """Rows longer than the model's context: fail stops the command, drop leaves them out, truncate cuts their prompts
    on the left."""
    on_bad_rows: OnBadRows = "fail"
    """Rows that cannot be used: fail stops the command, skip leaves them out and reports them."""
    columns: tuple[str, ...] = ()
    """Columns under other names, NAME=COLUMN: prompt=question reads the column question as the prompt; repeatable."""
    conversation: bool = False
    """Read prompts of plain text as a user's turn, and the completions and sides that follow them as the model's."""
    chat: Chat = field(default_factory=Chat)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        self.names  # noqa: B018 - what is wrong is an error now

    @functools.cached_property
    def names(self) -> Mapping[str, str]:
        """The columns of the data, by the names that the command reads."""
        return parse_columns(self.columns)

    def applied(self, row: Row) -> Row:
        """The row as a command reads it: its columns under their names, and what the options say of conversations."""
        if self.names:
            row = renamed(row, self.names)
        return self.chat.applied(as_turns(row) if self.conversation else row)


def unrounded() -> DeviceOptions:
    """Measurements multiply in the precision of the weights unless told otherwise."""
    return DeviceOptions(matmul_dtype="float32")


@dataclass(frozen=True, kw_only=True)
class EnvironmentOptions:
    """Environment."""

    env: str | None = None
    """Environment in which each completion is an episode: maze, guess, calculator, file.py:Class or module:Class. Its
    rewards are one more reward. No environment unless given."""
    env_weight: float = 1.0
    """Weight of its rewards beside others."""
    max_turns: int = 16
    """Turns of the policy in an episode."""
    turn_tokens: int | None = None
    """Tokens of one turn. By default as many as the completion may still have."""
    env_deadline: str = "60s"
    """Time limit of one answer of the environment, which has failed if it takes longer."""
    episode_limit: str | None = None
    """Time limit of an episode, which ends with the turn that exceeds it. No limit unless given."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "env_weight must be finite": math.isfinite(self.env_weight),
                "max_turns must be at least 1": self.max_turns >= 1,
                "turn_tokens must be at least 1": self.turn_tokens is None or self.turn_tokens >= 1,
            },
        )
        if self.env is None:
            self._require_defaults()
        self.deadline_seconds, self.limit_seconds  # noqa: B018 - a bad duration is an error now

    def _require_defaults(self) -> None:
        """Raise :class:`ConfigError` for an option that does nothing without an environment."""
        for entry in fields(self):
            if getattr(self, entry.name) != entry.default:
                raise ConfigError(f"{entry.name} needs an environment", hint="give --env")

    @property
    def deadline_seconds(self) -> float:
        return seconds(self.env_deadline, name="env_deadline")

    @property
    def limit_seconds(self) -> float | None:
        return None if self.episode_limit is None else seconds(self.episode_limit, name="episode_limit")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Completions."""

    group_size: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Seed of every completion."""
    data: DataOptions = field(default_factory=DataOptions)
    device: DeviceOptions = field(default_factory=unrounded)
    environment: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"group_size must be at least 1": self.group_size >= 1})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run."""

    out: str
    """Run directory; nothing is written outside it."""
    seed: int = 0
    """Seed of every random choice of the run."""
    overwrite: bool = False
    """Replace the run that is in the directory."""
    checkpoint_activations: bool = False
    """Activation checkpointing: recompute activations in the backward pass; less memory, a third more arithmetic."""
    save_every: int = 10
    """Steps between checkpoints (in rejection sampling, fine-tuning steps); 0 saves one at the end only."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: str | None = None
    """Metric that chooses the step whose weights become model/: --keep-best reward chooses the highest value,
    --keep-best=-eval/loss the lowest. Unless given, they are those of the last step."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of the run once it is finished: it can then be resumed for more steps."""
    stop_after: str | None = None
    """Time limit, such as 3h55m: save and stop then; tether resume continues. No limit unless given."""
    quiet: bool = False
    """Show no progress."""
    track: tuple[TrackerName, ...] = ()
    """Tracker that shows the run too: tensorboard, wandb, trackio or mlflow; repeatable. It sends what its own settings
    say, and where it fails the run continues without it."""
    device: DeviceOptions = field(default_factory=DeviceOptions)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "out must be a directory on this machine": "://" not in self.out,
                "save_every must be 0 or more": self.save_every >= 0,
                "keep_last must be at least 1": self.keep_last >= 1,
            },
        )
        self.stop_after_seconds  # noqa: B018 - a bad duration is an error now

    @property
    def stop_after_seconds(self) -> float | None:
        return None if self.stop_after is None else seconds(self.stop_after, name="stop_after")


EVALUATED_REWARD = "eval/reward"
"""What early stopping watches, unless ``keep_best`` names another metric."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation, and ending early."""

    eval_prompts: str | None = None
    """Held-out prompts on which the model is compared with its reference at the end; no comparison unless given."""
    eval_every: int = 0
    """Steps (in rejection sampling, rounds) between evaluations on them; 0 evaluates at the end only."""
    eval_group_size: int = 4
    """Completions per held-out prompt."""
    eval_reward: tuple[str, ...] = ()
    """Reward that is reported on the held-out prompts and not trained on, such as a judge: as --reward, without a
    weight; repeatable."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better eval/reward (dpo: eval/loss), or metric of keep_best;
    0 is off."""
    stop_kl: float | None = None
    """Stop when the KL to the reference exceeds this many nats per completion: eval/kl where it is evaluated, else the
    mean kl of the last 3 steps. No limit unless given."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "eval_every must be 0 or more": self.eval_every >= 0,
                "eval_group_size must be at least 1": self.eval_group_size >= 1,
                "patience must be 0 or more": self.patience >= 0,
                "stop_kl must be positive": self.stop_kl is None or self.stop_kl > 0,
                "eval_every needs eval_prompts: give --eval-prompts": not self.eval_every or bool(self.eval_prompts),
                "eval_reward needs eval_prompts: give --eval-prompts": not self.eval_reward or bool(self.eval_prompts),
            },
        )


@dataclass(frozen=True, kw_only=True)
class RewardCalls:
    """Calls of rewards."""

    reward_deadline: str = "30m"
    """Time limit of a reward function, server or judge for one step; a call that takes longer has failed."""
    reward_retries: int = 0
    """Number of times to retry a reward function that failed; use it only where repeated calls are harmless."""
    request_retries: int = 5
    """Times to send a request to a server or judge again that is busy or gone, after pauses of 1, 2, 4, ... seconds."""
    request_concurrency: int = 16
    """Requests to a server or judge at the same time."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "reward_retries must be 0 or more": self.reward_retries >= 0,
                "request_retries must be 0 or more": self.request_retries >= 0,
                "request_concurrency must be at least 1": self.request_concurrency >= 1,
            },
        )
        self.reward_deadline_seconds  # noqa: B018 - a bad duration is an error now

    @property
    def reward_deadline_seconds(self) -> float:
        return seconds(self.reward_deadline, name="reward_deadline")

    @property
    def supervision(self) -> dict[str, Any]:
        """What :func:`tether.rewards.resolve.resolve_scorer` is given."""
        return {
            "deadline": self.reward_deadline_seconds,
            "retries": self.reward_retries,
            "requests": Requests(concurrency=self.request_concurrency, retries=self.request_retries),
        }


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts and rewards."""

    prompts: str
    """Rows with a prompt: a file or a hub id."""
    reward: tuple[str, ...] = ()
    """Reward: a reward-model directory, file.py:function, module:function, a rule such as length:40, the address of a
    server, or judge:file.yaml. NAME:= before it names it, =WEIGHT after it weights it (1 unless given); several add up.
    Required unless there is an env."""
    rollouts_every: int = 1
    """Steps between rollout files; 0 writes none."""
    on_alarm: tuple[str, ...] = ()
    """What an alarm of a monitor does: log (the default) or stop the run; NAME=log or NAME=stop for one monitor;
    repeatable."""
    overlap_scoring: bool = False
    """Ask servers, judges and async functions about a group as soon as it has been sampled, and not about all groups of
    a step at its end."""
    calls: RewardCalls = field(default_factory=RewardCalls)
    environment: EnvironmentOptions = field(default_factory=EnvironmentOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    data: DataOptions = field(default_factory=DataOptions)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "reward must hold one, unless there is an env: a rule, file.py:function, module:function or a "
                "reward-model directory": bool(self.reward or self.environment.env),
                "rollouts_every must be 0 or more": self.rollouts_every >= 0,
            },
        )
        actions(self.on_alarm)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps."""

    steps: int = 100
    """Steps of the run. Each samples completions, scores them and updates the policy."""
    prompts_per_step: int = 16
    """Prompts per step, which has prompts_per_step * group_size completions."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "steps must be at least 1": self.steps >= 1,
                "prompts_per_step must be at least 1": self.prompts_per_step >= 1,
            },
        )


def require_minibatches(minibatches: int, completions: int) -> None:
    """Each minibatch of a step needs a completion."""
    if minibatches > completions:
        raise ConfigError(
            f"minibatches is {minibatches} and a step has {completions} completions (prompts_per_step * group_size)"
        )


def require_no_dropout(run: RunOptions) -> None:
    """An update that compares log-probs with those of the sampler needs the sampler's model."""
    if run.lora.lora_dropout:
        raise ConfigError(
            f"lora_dropout is {run.lora.lora_dropout:g}, and the update compares log-probs with those of the sampler, "
            "which has none",
            hint="leave --lora-dropout out",
        )


def require_evaluations(run: RunOptions, evaluation: EvaluationOptions) -> None:
    """What watches a metric of the evaluations needs evaluations during training."""
    watched = {
        "keep_best": run.keep_best,
        "patience": (run.keep_best or EVALUATED_REWARD) if evaluation.patience else None,
    }
    for option, metric in watched.items():
        if metric and metric_and_sign(metric)[0].startswith("eval/") and not evaluation.eval_every:
            raise ConfigError(
                f"{option} watches {metric}, which the run does not measure",
                hint="give --eval-every N and --eval-prompts",
            )


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """All of RLHF on the embedded model, without a network: pairs, reward model, three methods, evaluation, report."""

    out: str = "quickstart"
    """Directory to write."""
    seed: int = 0
    """Seed of every random choice."""
    overwrite: bool = False
    """Replace the run that is in the directory."""


@dataclass(frozen=True, kw_only=True)
class MazeOptions:
    """General RL: a model learns to walk through mazes by PPO with a critic, beside dynamic programming."""

    out: str = "maze"
    """Directory to write."""
    gamma: tuple[float, ...] = ()
    """Discount factor; repeatable, with a run for each. By default 1, 0.9 and 0.5."""
    seed: int = 0
    """Seed of every random choice."""
    overwrite: bool = False
    """Replace the run that is in the directory."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "gamma must lie in [0, 1], and each be given once": all(0 <= one <= 1 for one in self.gamma)
                and len(set(self.gamma)) == len(self.gamma)
            },
        )
