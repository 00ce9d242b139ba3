"""Options that several commands share, as frozen dataclasses; :mod:`tether.flags` fills them from files and flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from tether.data.checks import OnBadRows
from tether.data.records import Overlong
from tether.durations import seconds
from tether.errors import ConfigError
from tether.runtime.device import Dtype, MatmulDtype
from tether.types import Budget


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The device."""

    device: str = "auto"
    """Where models are: cpu, cuda or cuda:N; auto takes CUDA where there is one."""
    dtype: Dtype = "float32"
    """Precision of the weights."""
    matmul_dtype: MatmulDtype = "auto"
    """Precision in which float32 weights are multiplied: bfloat16 rounds the operands only; auto takes the faster."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Rows of data."""

    overlong: Overlong = "fail"
    """Rows longer than the model's context: fail stops the command, drop leaves them out, truncate cuts their prompts
    on the left."""
    on_bad_rows: OnBadRows = "fail"
    """Rows that cannot be used: fail stops the command, skip leaves them out and reports them."""


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
    """Metric whose best checkpoint is kept too: reward keeps the highest, =-eval/loss the lowest; none unless given."""
    stop_after: str | None = None
    """Time limit, such as 3h55m: save and stop then; tether resume continues. No limit unless given."""
    quiet: bool = False
    """Show no progress."""
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                f"out must be a directory on this machine, found {self.out}": "://" not in self.out,
                "save_every must be 0 or more": self.save_every >= 0,
                "keep_last must be at least 1": self.keep_last >= 1,
            }
        )
        self.stop_after_seconds  # noqa: B018 - a bad duration is an error now

    @property
    def stop_after_seconds(self) -> float | None:
        return None if self.stop_after is None else seconds(self.stop_after, name="stop_after")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts and rewards."""

    prompts: str
    """Rows with a prompt: a file or a hub id."""
    reward: tuple[str, ...]
    """Reward: a reward-model directory, file.py:function, module:function or a rule; NAME:= before it names it, =WEIGHT
    after it weights it (1 unless given); repeatable."""
    eval_prompts: str | None = None
    """Held-out prompts on which the model is compared with its reference at the end; no comparison unless given."""
    rollouts_every: int = 1
    """Steps between rollout files; 0 writes none."""
    reward_deadline: str = "30m"
    """Time limit of a reward function for one step; a call that takes longer has failed."""
    reward_retries: int = 0
    """Number of times to retry a reward function that failed; use it only where repeated calls are harmless."""
    data: DataOptions = field(default_factory=DataOptions)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "reward is empty: give a reward-model directory, file.py:function, module:function or a rule": bool(
                    self.reward
                ),
                "rollouts_every must be 0 or more": self.rollouts_every >= 0,
                "reward_retries must be 0 or more": self.reward_retries >= 0,
            }
        )
        self.reward_deadline_seconds  # noqa: B018 - a bad duration is an error now

    @property
    def reward_deadline_seconds(self) -> float:
        return seconds(self.reward_deadline, name="reward_deadline")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps."""

    steps: int = 100
    """Steps of the run: roll out, score, update."""
    prompts_per_step: int = 16
    """Prompts per step; each gets group_size completions."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "steps must be at least 1": self.steps >= 1,
                "prompts_per_step must be at least 1": self.prompts_per_step >= 1,
            }
        )


def require_minibatches(minibatches: int, completions: int) -> None:
    """Each minibatch of a step needs a completion."""
    if minibatches > completions:
        raise ConfigError(
            f"minibatches is {minibatches} and a step has {completions} completions (prompts_per_step * group_size)"
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
