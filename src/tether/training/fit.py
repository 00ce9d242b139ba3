"""Whether a run fits into a device's memory, how long its steps take, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tether.commands import TABLE, find
from tether.config import DataOptions, EvaluationOptions
from tether.data.checks import DataReport
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import ConfigError, ModelError
from tether.flags import parse
from tether.models.dry_run import Form, shell, without_memory
from tether.models.loading import load_tokenizer
from tether.rewards.resolve import split_name, split_weight
from tether.rewards.rules import RULES
from tether.runtime.device import Dtype, pick_device, pick_dtype, pick_matmul_dtype
from tether.training.estimate import of_demonstrations, of_pairs, of_prompts
from tether.training.footprint import Footprint, dry_run
from tether.training.loading import reader
from tether.training.step_time import measured, seconds
from tether.training.workload import WORKLOADS, Extent, Row, Workload

ABSENT = "(not given)"
"""Stands for an input that the estimate does without."""
STAND_INS: Mapping[str, Any] = dict.fromkeys(("out", "data", "pairs", "prompts"), ABSENT) | {"reward": (ABSENT,)}
CHANGES: Sequence[tuple[str, ...]] = (
    ("--micro-batch-tokens", "4096"),
    ("--micro-batch-tokens", "2048"),
    ("--micro-batch-tokens", "1024"),
    ("--checkpoint-activations",),
    ("--cache-gib", "1"),
    ("--cache-gib", "0.25"),
    ("--dtype", "bfloat16"),
    ("--lora-rank", "16"),
    ("--quantise", "4bit"),
)
"""What makes a run smaller, from what changes nothing but the speed to what changes what is learned."""
WORTH = 0.01
"""Share of the peak that a change must save to be named."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that is being thought of."""

    title: str
    arguments: Sequence[str]
    """Options of its command."""
    lengths: tuple[int, int]
    """Tokens of a prompt, and of a completion or a side, where no data is given."""
    memory: int | None
    """Bytes of a CUDA device to judge by; None is the device of this machine that the options name."""
    process: int
    """Bytes of a process with tether."""

    def options(self, *more: str) -> Any:
        """The options of the command, with ``more`` of them."""
        command = find(self.title, TABLE)
        assert command is not None
        return parse(self.title, command.options_class(), [*self.arguments, *more], given=STAND_INS)

    def device_of(self, options: Any) -> torch.device:
        return torch.device("cuda") if self.memory is not None else pick_device(options.run.device.device)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a plan."""

    work: Workload
    footprint: Footprint
    matmul_dtype: Dtype


def judged(plan: Plan, extent: Extent, *more: str) -> Found:
    """The footprint of a plan, with ``more`` options."""
    options = plan.options(*more)
    device, name = plan.device_of(options), options.run.device.matmul_dtype
    with without_memory():
        model = shell(extent.policy, dtype=pick_dtype(options.run.device.dtype))
    if plan.memory is not None:
        matmul_dtype: Dtype = "bfloat16" if name == "auto" else name
    else:
        matmul_dtype = pick_matmul_dtype(name, model, device)
    work = WORKLOADS[plan.title](options, extent)
    found = dry_run(work, matmul_dtype=matmul_dtype, device=device, process=plan.process, memory=plan.memory)
    return Found(work=work, footprint=found, matmul_dtype=matmul_dtype)


Change = tuple[str, ...]


def smaller(plan: Plan, extent: Extent, room: int) -> Iterator[tuple[Change, int]]:
    """Changes that make the plan smaller, each on top of those before, until it fits into ``room`` bytes: the options,
    and the peak with all of them."""
    taken: list[Change] = []
    peak = judged(plan, extent).footprint.peak
    for change in CHANGES:
        if change[0] == "--quantise" and "--lora-rank" not in (*flat(taken), *plan.arguments):
            continue
        try:
            found = judged(plan, extent, *flat([*taken, change])).footprint.peak
        except ConfigError:  # an option that the command lacks, or that does not go with the others
            continue
        if found < peak * (1 - WORTH):
            peak = found
            taken.append(change)
            yield change, peak
        if peak <= room:
            return


def enough(plan: Plan, extent: Extent, room: int, taken: Sequence[Change]) -> tuple[list[Change], int]:
    """The changes of ``taken``, with which the plan fits into ``room`` bytes, without those that are not needed, and
    the peak: a later change may save more than all before."""
    kept = list(taken)
    for change in reversed(taken[:-1]):
        without = [one for one in kept if one is not change]
        if judged(plan, extent, *flat(without)).footprint.peak <= room:
            kept = without
    last = [one for i, one in enumerate(kept) if one[0] not in [later[0] for later in kept[i + 1 :]]]
    return last, judged(plan, extent, *flat(last)).footprint.peak


def flat(changes: Sequence[Change]) -> list[str]:
    return [text for change in changes for text in change]


def step_seconds(found: Found, device: torch.device) -> dict[str, float]:
    """Seconds of each phase of a step on this machine."""
    dtype = pick_dtype("bfloat16" if found.work.run.device.dtype == "bfloat16" else found.matmul_dtype)
    amounts = found.footprint.amounts
    return seconds(amounts, measured(dtype, device, rows=amounts.rows))


# ------------------------------------------------------------------------------------------------- what a plan reads


def extent_of_plan(plan: Plan) -> Extent:
    """The models of a plan, and the lengths of its data where it is given, else those that were named."""
    options = plan.options()
    policy = Form.named(options.model)
    source, read, lengths_of, sides = data_of(plan.title, options)
    prompt, completion = plan.lengths
    rows: list[Row] = [(prompt, [completion] * sides)] * rows_of_step(options)
    held_out: list[Row] = []
    evaluation = evaluation_of(options)
    questions = evaluation.eval_prompts if evaluation else None
    if source != ABSENT or questions:
        load = reading(options, policy)
        rows = lengths_of(load(read, source)) if source != ABSENT else rows
        held_out = of_prompts(load(load_prompts, questions)) if questions else []
    judges = [Form.named(name) for name in reward_models(options)]
    return Extent(policy=policy, rows=rows, held_out=held_out, reward_models=judges)


def data_of(title: str, options: Any) -> tuple[str, Callable[..., Any], Callable[..., list[Row]], int]:
    """The data of a command, what reads it, what gives its lengths, and completions or sides of a row."""
    if title == "sft":
        return options.data, load_demonstrations, of_demonstrations, 1
    if title in ("reward", "dpo"):
        return options.pairs, load_pairs, of_pairs, 2
    return options.task.prompts, load_prompts, of_prompts, 0


def reading(options: Any, policy: Form) -> Callable[..., Any]:
    """``load(read, source)`` for the model and the data options of a command."""
    with without_memory():
        model = shell(policy, dtype=torch.float32)
    data: DataOptions = options.task.data if hasattr(options, "task") else options.data_options
    try:
        tokenizer = load_tokenizer(options.model)
    except ModelError as error:
        error.advise("give its files, or lengths in place of the data: --prompt-tokens and --completion-tokens")
        raise

    def load(read: Callable[..., Any], source: str) -> Any:
        more = {"max_new_tokens": sampling_of(options).max_new_tokens} if read is load_prompts else {}
        return reader(read, model, tokenizer, data, DataReport(quiet=True))(source, **more)

    return load


def algorithm_of(options: Any) -> Any:
    """The options of a command's algorithm."""
    names = ("sft", "reward", "dpo", "rejection_sampling", "ppo", "grpo")
    return next(getattr(options, name) for name in names if hasattr(options, name))


def sampling_of(options: Any) -> Any:
    return options.sampling if hasattr(options, "sampling") else algorithm_of(options).sampling


def evaluation_of(options: Any) -> EvaluationOptions | None:
    return getattr(getattr(options, "task", options), "evaluation", None)


def rows_of_step(options: Any) -> int:
    """Rows of data that a step takes; a round of rejection sampling takes all that there are, here as many as fill the
    engine."""
    if hasattr(options, "length"):
        return int(options.length.prompts_per_step)
    algorithm = algorithm_of(options)
    return int(options.task.budget.max_rows if hasattr(algorithm, "sft") else algorithm.batch_size)


def reward_models(options: Any) -> list[str]:
    """The models among the rewards of a command."""
    values = options.task.reward if hasattr(options, "task") else ()
    if evaluation := evaluation_of(options):
        values = (*values, *evaluation.eval_reward)
    specs = [split_weight(split_name(value)[1])[0] for value in values]
    return [spec for spec in specs if spec not in RULES and ":" not in spec and spec != ABSENT]
