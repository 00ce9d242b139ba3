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
        name="doctor",
        group="start here",
        summary="what this machine has, and whether tether works on it",
        options="tether.doctor:Doctor",
        run="tether.doctor:main",
    ),
    Command(
        name="sft",
        group="train",
        summary="fine-tune on texts or on prompts with completions",
        options="tether.training.sft:SFT",
        run="tether.training.sft:train",
        resumable=True,
    ),
    Command(
        name="reward",
        group="train",
        summary="train a reward model on preference pairs",
        options="tether.training.reward:Reward",
        run="tether.training.reward:train",
        resumable=True,
    ),
    Command(
        name="rejection-sampling",
        group="train",
        summary="sample N, keep the best K, fine-tune on them",
        options="tether.training.rejection_sampling:RejectionSampling",
        run="tether.training.rejection_sampling:train",
        resumable=True,
    ),
    Command(
        name="ppo",
        group="train",
        summary="improve a policy by PPO with a value function",
        options="tether.training.ppo:PPO",
        run="tether.training.ppo:train",
        resumable=True,
    ),
    Command(
        name="grpo",
        group="train",
        summary="improve a policy by GRPO",
        options="tether.training.grpo:GRPO",
        run="tether.training.grpo:train",
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
        options="tether.inspection:Generate",
        run="tether.inspection:generate",
    ),
    Command(
        name="eval",
        group="look",
        summary="measure a policy on prompts, or a reward model on pairs",
        options="tether.inspection:Eval",
        run="tether.inspection:evaluate",
    ),
    Command(
        name="report",
        group="look",
        summary="draw one run or several as one HTML page",
        options="tether.inspection:Report",
        run="tether.inspection:report",
    ),
)


def find(name: str, table: Table) -> Command | None:
    """The command called ``name``."""
    return next((command for command in table if command.name == name), None)
