"""The options of every command, as frozen dataclasses; :mod:`tether.flags` fills them from files and flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from tether.algorithms import grpo, ppo, rejection_sampling, reward_model, sft
from tether.data.checks import OnBadRows
from tether.data.records import Overlong
from tether.durations import seconds
from tether.errors import ConfigError
from tether.runtime.device import Dtype, Products
from tether.types import Budget, Sampling


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
    products: Products = "auto"
    """What float32 weights are multiplied in: bfloat16 rounds the operands alone, auto takes it where it is faster."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more arithmetic."""
    save_every: int = 10
    """Steps between checkpoints, fine-tuning steps in rejection sampling; 0 saves one at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_best: str | None = None
    """Keep the checkpoint with the highest value of this metric too: reward; or the lowest: =-eval/loss."""
    stop_after: str | None = None
    """Save and stop after this time, such as 3h55m; tether resume goes on."""
    quiet: bool = False
    """No progress."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                f"out must be a directory on this machine, found {self.out}": "://" not in self.out,
                "save_every must be 0 or more": self.save_every >= 0,
                "keep_last must be at least 1": self.keep_last >= 1,
            }
        )
        self.stop_after_seconds  # noqa: B018 - to be found wrong now

    @property
    def stop_after_seconds(self) -> float | None:
        return None if self.stop_after is None else seconds(self.stop_after, name="stop_after")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts, and what their completions are worth."""

    prompts: str
    """Rows with a prompt: a file or a hub id."""
    reward: tuple[str, ...]
    """A reward-model directory, file.py:function, module:function or a rule; =WEIGHT after it if not 1; repeatable."""
    eval_prompts: str | None = None
    """Held-out prompts to compare the model with its reference on, at the end."""
    overlong: Overlong = "fail"
    """What happens to rows that do not fit the model's context: they are dropped, or their prompts cut on the left."""
    on_bad_rows: OnBadRows = "fail"
    """What happens to rows that cannot be used: they stop the command, or are left out and written down."""
    rollouts_every: int = 1
    """Steps between rollout files; 0 writes none."""
    reward_deadline: str = "30m"
    """A reward function that takes longer than this for one step has failed."""
    reward_retries: int = 0
    """Call a reward function that failed again, so many times; only for one that may see the same completions twice."""
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
        self.reward_deadline_seconds  # noqa: B018 - to be found wrong now

    @property
    def reward_deadline_seconds(self) -> float:
        return seconds(self.reward_deadline, name="reward_deadline")


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


def require_minibatches(minibatches: int, completions: int) -> None:
    """Each minibatch of a step needs a completion."""
    if minibatches > completions:
        raise ConfigError(
            f"minibatches is {minibatches} and a step has {completions} completions (prompts_per_step * group_size)"
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
    """What happens to rows that do not fit the model's context: they are dropped, or their prompts cut on the left."""
    on_bad_rows: OnBadRows = "fail"
    """What happens to rows that cannot be used: they stop the command, or are left out and written down."""
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
    """What happens to rows that do not fit the model's context: they are dropped, or their prompts cut on the left."""
    on_bad_rows: OnBadRows = "fail"
    """What happens to rows that cannot be used: they stop the command, or are left out and written down."""
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

    def __post_init__(self) -> None:
        require_minibatches(self.ppo.minibatches, self.length.prompts_per_step * self.ppo.group_size)


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Improve a policy by GRPO."""

    model: str
    """The policy to start from: a directory, a hub id or 'base'."""
    task: PromptOptions
    run: RunOptions
    length: Steps = field(default_factory=Steps)
    grpo: grpo.Config = field(default_factory=grpo.Config)

    def __post_init__(self) -> None:
        require_minibatches(self.grpo.minibatches, self.length.prompts_per_step * self.grpo.group_size)


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
    """What happens to rows that do not fit the model's context: they are dropped, or their prompts cut on the left."""
    on_bad_rows: OnBadRows = "fail"
    """What happens to rows that cannot be used: they stop the command, or are left out and counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "float32"
    """Of the weights."""
    products: Products = "float32"
    """What float32 weights are multiplied in: bfloat16 rounds the operands alone, auto takes it where it is faster."""
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless({"group_size must be at least 1": self.group_size >= 1})


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a policy on prompts, or a reward model on pairs; the result is one JSON object."""

    model: str | None = None
    """The policy: a directory, a hub id or 'base'."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: tuple[str, ...] = ()
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
    """What happens to rows that do not fit the model's context: they are dropped, or their prompts cut on the left."""
    on_bad_rows: OnBadRows = "fail"
    """What happens to rows that cannot be used: they stop the command, or are left out and counted."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Dtype = "float32"
    """Of the weights."""
    products: Products = "float32"
    """What float32 weights are multiplied in: bfloat16 rounds the operands alone, auto takes it where it is faster."""
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        policy = (self.model, self.prompts, self.reward, self.reference)
        judge = (self.reward_model, self.pairs)
        ConfigError.unless(
            {
                "give --model, --prompts and --reward to measure a policy, or --reward-model and --pairs": (
                    all(policy[:3]) and not any(judge)
                )
                or (all(judge) and not any(policy)),
                "group_size must be at least 1": self.group_size >= 1,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a training run that was interrupted: with the same numbers, as if nothing had happened."""

    directory: str = field(metadata={"positional": True})
    """The run directory; options of the run's own command may follow it."""
    allow: bool = False
    """Accept options that differ from the run's, where they are safe to change, such as steps."""
    options: tuple[str, ...] = field(default=(), metadata={"rest": True})
    """Of the run's own command, as they were given."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw a run as one HTML page."""

    directory: str = field(metadata={"positional": True})
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
