"""``tether generate``: sample completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tether.config import DataOptions, DeviceOptions
from tether.data.checks import DataReport
from tether.data.records import load_prompts
from tether.errors import ConfigError, DataError
from tether.generation.engine import Engine
from tether.looking.terminal import show
from tether.models.loading import context_length, embedding_rows, load_policy, unembedded
from tether.runtime.device import pick_device, pick_dtype
from tether.runtime.files import is_stream, require_file, write_output
from tether.runtime.json_text import to_json
from tether.training.common import require_room, set_matmul_dtype
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
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"group_size must be at least 1": self.group_size >= 1})


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
        unembedded=unembedded(tokenizer, embedding_rows(model)),
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
