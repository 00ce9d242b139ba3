"""``tether generate``: sample completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tether.config import SampleOptions
from tether.errors import ConfigError, DataError
from tether.generation.engine import Engine
from tether.looking.terminal import show
from tether.runtime.files import is_stream, require_file, write_output
from tether.runtime.json_text import to_json
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import episodes_of, load_model, load_prompts_of
from tether.types import Completion, Prompt, make_requests
from tether.untrusted import printable


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample completions, one JSON object per line."""

    model: str
    """Model to sample from: a directory, a hub id or 'base'."""
    prompts: str
    """Rows with a prompt: a file or a hub id."""
    out: str | None = None
    """File, pipe or device to write to; the terminal unless given."""
    samples: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)


@naming_the_model_of_a_run()
def generate(command: Generate) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    samples = command.samples
    model, tokenizer, _ = load_model(command.model, samples.device)
    prompts = load_prompts_of(command.prompts, model, tokenizer, data=samples.data, sampling=samples.sampling)
    names = column_names(prompts, where=command.prompts)
    asked = make_requests(prompts, group_size=samples.group_size, seed=samples.seed)
    engine = Engine(model, tokenizer, budget=samples.budget, episodes=episodes_of(samples.environment))
    groups = engine.generate(asked, sampling=samples.sampling)
    lines = [as_line(group.prompt, completion, names) for group in groups for completion in group.completions]
    if command.out is None:
        show("\n".join(map(printable, lines)))
        return
    out = Path(command.out)
    write_output(out, "".join(f"{printable(line) if is_stream(out) else line}\n" for line in lines).encode())


GENERATED = ("prompt", "completion", "finish_reason", "tokens", "turn_rewards", "info")
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
    if completion.turns:
        row |= {"turn_rewards": [turn.reward for turn in completion.turns], "info": dict(completion.turns[-1].info)}
    return to_json(row)
