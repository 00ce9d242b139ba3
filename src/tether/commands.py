"""The table of commands: one row each, shared by the command line, its help and ``tether resume``."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal["start here", "train", "look"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. What it needs is imported when it is called, so that ``tether --help`` is instant."""

    name: str
    group: Group
    """The title that it stands under in the help."""
    summary: str
    """One line of the help."""
    options: str
    """Its options, a dataclass: ``module:name``."""
    run: str
    """The function that is called with the options, ``module:name``; one that is :attr:`resumable` takes a
    :class:`tether.training.common.Start` too, as ``start=``."""
    resumable: bool = False
    """Whether it leaves a run directory that ``tether resume`` can continue."""
    first: tuple[str, ...] = ()
    """The options that its help shows first, where it has many."""
    takes_table: bool = False
    """Whether it calls other commands, and so takes this table, as ``table=``."""

    def options_class(self) -> type[Any]:
        """The class of its options."""
        found: type[Any] = pkgutil.resolve_name(self.options)
        return found

    def function(self) -> Callable[..., None]:
        """The function that it runs."""
        found: Callable[..., None] = pkgutil.resolve_name(self.run)
        return found


Table = Sequence[Command]

TABLE: Table = (
    Command(
        name="quickstart",
        group="start here",
        summary="all of RLHF on a small model, in a few minutes, with a report",
        options="tether.config:Quickstart",
        run="tether.quickstart:main",
    ),
    Command(
        name="maze",
        group="start here",
        summary="general RL: PPO with a critic beside dynamic programming, in mazes",
        options="tether.config:MazeOptions",
        run="tether.maze:main",
    ),
    Command(
        name="doctor",
        group="start here",
        summary="what this machine has, and whether a run fits into its memory",
        options="tether.doctor:Doctor",
        run="tether.doctor:main",
    ),
    Command(
        name="presets",
        group="start here",
        summary="list the recipes that a training command can begin with",
        options="tether.looking.presets:Presets",
        run="tether.looking.presets:main",
    ),
    Command(
        name="sft",
        group="train",
        summary="fine-tune on texts or on prompts with completions",
        options="tether.training.sft:SFT",
        run="tether.training.sft:train",
        first=(
            "model",
            "data",
            "eval_data",
            "out",
            "epochs",
            "batch_size",
            "learning_rate",
            "lr_schedule",
            "overlong",
            "seed",
        ),
        resumable=True,
    ),
    Command(
        name="reward",
        group="train",
        summary="train a reward model on preference pairs",
        options="tether.training.reward:Reward",
        run="tether.training.reward:train",
        first=(
            "model",
            "pairs",
            "eval_pairs",
            "test_pairs",
            "out",
            "epochs",
            "batch_size",
            "learning_rate",
            "overlong",
            "on_bad_rows",
        ),
        resumable=True,
    ),
    Command(
        name="dpo",
        group="train",
        summary="fit a policy to preference pairs directly",
        options="tether.training.dpo:DPO",
        run="tether.training.dpo:train",
        first=(
            "model",
            "pairs",
            "eval_pairs",
            "out",
            "beta",
            "loss",
            "epochs",
            "batch_size",
            "learning_rate",
            "eval_prompts",
        ),
        resumable=True,
    ),
    Command(
        name="rejection-sampling",
        group="train",
        summary="sample N, keep the best K, fine-tune on them",
        options="tether.training.rejection_sampling:RejectionSampling",
        run="tether.training.rejection_sampling:train",
        first=(
            "model",
            "prompts",
            "reward",
            "out",
            "eval_prompts",
            "group_size",
            "top_k",
            "rounds",
            "max_new_tokens",
            "learning_rate",
        ),
        resumable=True,
    ),
    Command(
        name="ppo",
        group="train",
        summary="improve a policy by PPO with a value function",
        options="tether.training.ppo:PPO",
        run="tether.training.ppo:train",
        first=(
            "model",
            "prompts",
            "reward",
            "out",
            "eval_prompts",
            "steps",
            "prompts_per_step",
            "kl_coef",
            "max_new_tokens",
            "learning_rate",
        ),
        resumable=True,
    ),
    Command(
        name="grpo",
        group="train",
        summary="improve a policy by GRPO",
        options="tether.training.grpo:GRPO",
        run="tether.training.grpo:train",
        first=(
            "model",
            "prompts",
            "reward",
            "out",
            "eval_prompts",
            "steps",
            "group_size",
            "kl_coef",
            "max_new_tokens",
            "learning_rate",
        ),
        resumable=True,
    ),
    Command(
        name="resume",
        group="train",
        summary="resume a run that was interrupted",
        options="tether.resume:Resume",
        run="tether.resume:resume",
        takes_table=True,
    ),
    Command(
        name="generate",
        group="look",
        summary="sample completions",
        options="tether.looking.generate:Generate",
        run="tether.looking.generate:generate",
        first=(
            "model",
            "prompts",
            "out",
            "group_size",
            "max_new_tokens",
            "temperature",
            "top_p",
            "stop",
            "overlong",
            "seed",
        ),
    ),
    Command(
        name="pairs",
        group="look",
        summary="sample pairs of completions and have them labelled, by a reward, a function, a program or a judge",
        options="tether.looking.pairs:Pairs",
        run="tether.looking.pairs:main",
        first=(
            "model",
            "prompts",
            "labeller",
            "out",
            "group_size",
            "label_temperature",
            "label_noise",
            "max_new_tokens",
            "temperature",
            "seed",
        ),
    ),
    Command(
        name="eval",
        group="look",
        summary="measure a policy on prompts, or a reward model on pairs",
        options="tether.looking.evaluate:Eval",
        run="tether.looking.evaluate:evaluate",
        first=(
            "model",
            "prompts",
            "reward",
            "reference",
            "reward_model",
            "pairs",
            "group_size",
            "max_new_tokens",
            "temperature",
            "seed",
        ),
    ),
    Command(
        name="merge",
        group="look",
        summary="write an adapter and its base as one whole model",
        options="tether.looking.merge:Merge",
        run="tether.looking.merge:main",
    ),
    Command(
        name="serve-reward",
        group="look",
        summary="serve a reward model to runs in other processes",
        options="tether.serve.reward_server:ServeReward",
        run="tether.serve.reward_server:main",
    ),
    Command(
        name="ls",
        group="look",
        summary="list the runs below a directory",
        options="tether.looking.ls:Ls",
        run="tether.looking.ls:main",
    ),
    Command(
        name="show",
        group="look",
        summary="read the completions of a run, with rewards, log-probs, KL and advantages",
        options="tether.looking.show:Show",
        run="tether.looking.show:main",
    ),
    Command(
        name="chat",
        group="look",
        summary="talk to a model, or to two beside each other",
        options="tether.looking.chat:Chat",
        run="tether.looking.chat:main",
        first=(
            "model",
            "against",
            "system",
            "chat_template",
            "max_new_tokens",
            "temperature",
            "top_p",
            "stop",
            "seed",
            "device",
        ),
    ),
    Command(
        name="audit",
        group="look",
        summary="watch finished runs for reward hacking, and for why they do not learn",
        options="tether.looking.audit:Audit",
        run="tether.looking.audit:main",
    ),
    Command(
        name="compare",
        group="look",
        summary="say which of several runs is better, by how much, and how sure that is",
        options="tether.looking.compare:Compare",
        run="tether.looking.compare:main",
    ),
    Command(
        name="frontier",
        group="look",
        summary="reward against the distance from the reference, and where another reward peaks",
        options="tether.looking.frontier:Frontier",
        run="tether.looking.frontier:main",
    ),
    Command(
        name="report",
        group="look",
        summary="draw one run or several as one HTML page",
        options="tether.looking.report:Report",
        run="tether.looking.report:report",
    ),
    Command(
        name="csv",
        group="look",
        summary="write the metrics of one run or several as CSV",
        options="tether.looking.csv:CSV",
        run="tether.looking.csv:main",
    ),
)


def find(name: str, table: Table) -> Command | None:
    """The command called ``name``."""
    return next((command for command in table if command.name == name), None)
