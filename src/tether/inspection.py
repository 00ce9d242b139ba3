"""Commands that look at models and runs: ``tether generate``, ``eval`` and ``report``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tether.algorithms import reward_model
from tether.config import DataOptions, DeviceOptions
from tether.data.checks import DataReport
from tether.data.records import load_pairs, load_prompts
from tether.errors import ConfigError, DataError, RunError
from tether.evaluation import evaluate_policy, policy_kl, require_comparable, sample_and_score
from tether.flags import POSITIONAL
from tether.generation.engine import Engine
from tether.models.loading import context_length, load_policy
from tether.models.reference import FrozenCopy
from tether.models.reward import load_reward_model
from tether.report.run import write_report
from tether.rewards.checks import prepared
from tether.rewards.resolve import resolve_scorer
from tether.runtime.device import pick_device, pick_dtype
from tether.runtime.files import is_stream, require_file, write_output
from tether.runtime.json_text import to_json
from tether.seeds import derive_seed
from tether.training.common import EVAL_SEED, require_room, set_matmul_dtype
from tether.training.inputs import naming_the_model_of_a_run
from tether.types import Budget, Completion, Prompt, Sampling, make_requests
from tether.untrusted import printable


def unrounded() -> DeviceOptions:
    """Measurements multiply in the precision of the weights unless told otherwise."""
    return DeviceOptions(matmul_dtype="float32")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample completions, one JSON object per line."""

    model: str
    """Model to sample from: a directory, a hub id or 'base'."""
    prompts: str
    """Rows with a prompt: a file or a hub id."""
    out: str | None = None
    """File, pipe or device to write to; the terminal unless given."""
    group_size: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Seed of every completion."""
    data: DataOptions = field(default_factory=DataOptions)
    device: DeviceOptions = field(default_factory=unrounded)
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless({"group_size must be at least 1": self.group_size >= 1})


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a policy on prompts, or a reward model on pairs; the result is one JSON object."""

    model: str | None = None
    """Policy to measure: a directory, a hub id or 'base'."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: tuple[str, ...] = ()
    """Reward of the completions, as in training."""
    reference: str | None = None
    """Model to measure the KL and the win rate against; neither is reported unless given."""
    reward_model: str | None = None
    """Reward model to measure, instead of a policy."""
    pairs: str | None = None
    """Rows with chosen and rejected, for a reward model."""
    group_size: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Seed of every completion."""
    data: DataOptions = field(default_factory=DataOptions)
    device: DeviceOptions = field(default_factory=unrounded)
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
class Report:
    """Draw one run, or several beside each other, as one HTML page."""

    runs: tuple[str, ...] = field(metadata={POSITIONAL: "RUN"})
    """Run directories."""
    out: str | None = None
    """File to write; report.html of the run unless given, which several runs require."""


@naming_the_model_of_a_run()
def generate(command: Generate) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    model, tokenizer = load_policy(
        command.model, dtype=pick_dtype(command.device.dtype), device=pick_device(command.device.device)
    )
    set_matmul_dtype(command.device.matmul_dtype, model)
    require_room(model, command.sampling)
    report = DataReport()
    prompts = load_prompts(
        command.prompts,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.data.overlong,
        on_bad_rows=command.data.on_bad_rows,
        report=report,
    )
    names = column_names(prompts, where=command.prompts)
    report.tell()
    groups = Engine(model, tokenizer, budget=command.budget).generate(
        make_requests(prompts, group_size=command.group_size, seed=command.seed), sampling=command.sampling
    )
    lines = [as_line(group.prompt, completion, names) for group in groups for completion in group.completions]
    if command.out is None:
        show("\n".join(map(printable, lines)))
        return
    out = Path(command.out)
    write_output(out, "".join(f"{printable(line) if is_stream(out) else line}\n" for line in lines).encode())


def show(text: str) -> None:
    """Print the result of a command. Raises :class:`RunError` where the standard output takes no more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        raise
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror})", where="standard output") from error


GENERATED = ("prompt", "completion", "finish_reason", "tokens")
"""What ``tether generate`` says of a completion, beside the columns of its prompt."""


def column_names(prompts: Iterable[Prompt], *, where: str) -> dict[str, str]:
    """What each column of the prompts is called beside :data:`GENERATED`: ``data/NAME`` where its name is one of those.

    Raises :class:`DataError` where that is another column's name.
    """
    found = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    names = {name: f"data/{name}" if name in GENERATED else name for name in found}
    for name, new in names.items():
        if name != new and new in found:
            raise DataError(
                f"column {name!r} has the name of a result and would be called {new!r}, which is a column too",
                where=where,
                hint="rename one of them",
            )
    return names


def as_line(prompt: Prompt, completion: Completion, names: Mapping[str, str]) -> str:
    """A completion with its prompt and the prompt's columns under their ``names``, as JSON."""
    row = {
        **{names[name]: value for name, value in prompt.columns.items()},
        "prompt": list(prompt.messages) if prompt.messages else prompt.text,
        "completion": completion.text,
        "finish_reason": completion.finish_reason.value,
        "tokens": len(completion.ids),
    }
    return to_json(row)


@naming_the_model_of_a_run()
def evaluate(command: Eval) -> None:
    device, dtype = pick_device(command.device.device), pick_dtype(command.device.dtype)
    if command.reward_model is not None and command.pairs is not None:
        found = measured_judge(command, command.reward_model, command.pairs, device=device, dtype=dtype)
    else:
        assert command.model is not None
        assert command.prompts is not None
        found = measured_policy(command, command.model, command.prompts, device=device, dtype=dtype)
    show(to_json(found, indent=2, ascii_only=True))


def measured_judge(
    command: Eval, model: str, source: str, *, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What ``tether eval`` says of a reward model."""
    report = DataReport()
    judge, tokenizer = load_reward_model(model, dtype=dtype, device=device)
    set_matmul_dtype(command.device.matmul_dtype, judge)
    pairs = load_pairs(
        source,
        tokenizer,
        context=context_length(judge),
        overlong=command.data.overlong,
        on_bad_rows=command.data.on_bad_rows,
        report=report,
    )
    report.tell()
    return {"reward_model": model, **vars(reward_model.evaluate(judge, pairs, token_budget=16384))}


def measured_policy(
    command: Eval, name: str, source: str, *, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What ``tether eval`` says of a policy."""
    report = DataReport()
    model, tokenizer = load_policy(name, dtype=dtype, device=device)
    matmul_dtype = set_matmul_dtype(command.device.matmul_dtype, model)
    score = resolve_scorer(command.reward, tokenizer, dtype=dtype, device=device, rounded=matmul_dtype == "bfloat16")
    require_room(model, command.sampling)
    prompts = load_prompts(
        source,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.data.overlong,
        on_bad_rows=command.data.on_bad_rows,
        report=report,
    )
    score = prepared(score, {source: prompts}, max_new_tokens=command.sampling.max_new_tokens)
    report.tell()
    reference, own = (
        load_policy(command.reference, dtype=dtype, device=device) if command.reference else (model, tokenizer)
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            "its tokenizer is not the model's, so there is no KL between them", where=f"--reference {command.reference}"
        )
    if command.reference:
        require_comparable(
            model,
            reference,
            prompts,
            max_new_tokens=command.sampling.max_new_tokens,
            where=f"--reference {command.reference}",
        )
    set_matmul_dtype(matmul_dtype, reference)
    groups, against = (
        sample_and_score(
            Engine(one, tokenizer, budget=command.budget),
            score,
            prompts,
            group_size=command.group_size,
            sampling=command.sampling,
            seed=derive_seed(command.seed, EVAL_SEED),
        )
        for one in (model, reference)
    )
    if command.reference is None:
        found = evaluate_policy(groups, against, kl=0.0).as_dict()
        found = {key: value for key, value in found.items() if key not in ("kl", "win_rate")}
    else:
        temperature = command.sampling.temperature or 1.0
        kl = policy_kl(groups, policy=model, reference=FrozenCopy(reference), temperature=temperature)
        found = evaluate_policy(groups, against, kl=kl).as_dict()
    return {"model": name, "reference": command.reference, **found}


def report(command: Report) -> None:
    out = write_report([Path(run) for run in command.runs], Path(command.out) if command.out else None)
    if not is_stream(out):
        show(str(out))
