"""``tether pairs``: sample pairs of completions and have them labelled."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tether.config import DataOptions, DeviceOptions, RewardCalls, unrounded
from tether.errors import ConfigError, RewardError
from tether.generation.engine import Engine
from tether.labellers.labels import LABELS, Label, pairs_of, preferences
from tether.labellers.resolve import resolve_labeller
from tether.looking.terminal import show
from tether.runtime.files import require_file, write_output
from tether.runtime.json_text import to_json
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import load_model, load_prompts_of
from tether.types import Budget, Sampling, make_requests


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Sample pairs of completions, have them labelled, and write preference pairs that reward and dpo read."""

    model: str
    """Model to sample from: a directory, a hub id or 'base'."""
    prompts: str
    """Rows with a prompt: a file or a hub id."""
    labeller: str
    """Who compares: gold:REWARD, 'command:PROGRAM ARGUMENTS', judge:file.yaml, file.py:function or module:function."""
    out: str
    """File to write the preference pairs to, one JSON object per line."""
    group_size: int = 2
    """Completions per prompt, compared two by two."""
    label_temperature: float = 0.0
    """Of a gold labeller, in units of the reward: the better one is preferred with probability
    sigmoid(difference / temperature); 0 always prefers it."""
    label_noise: float = 0.0
    """Of a gold labeller: the share of preferences that are turned around."""
    seed: int = 0
    """Seed of every completion, and of the draws of a gold labeller."""
    calls: RewardCalls = field(default_factory=RewardCalls)
    data: DataOptions = field(default_factory=DataOptions)
    device: DeviceOptions = field(default_factory=unrounded)
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "group_size must be even and at least 2": self.group_size >= 2 and self.group_size % 2 == 0,
                "label_temperature must be 0 or more": 0 <= self.label_temperature < math.inf,
                "label_noise must be from 0 to 1": 0 <= self.label_noise <= 1,
                "label_temperature and label_noise need a gold labeller: give gold:REWARD": (
                    self.labeller.startswith("gold:") or not (self.label_temperature or self.label_noise)
                ),
            },
        )


@naming_the_model_of_a_run()
def main(command: Pairs) -> None:
    out = Path(command.out)
    require_file(out)
    model, tokenizer, _ = load_model(command.model, command.device)
    labeller = resolve_labeller(
        command.labeller,
        model,
        tokenizer,
        temperature=command.label_temperature,
        noise=command.label_noise,
        seed=command.seed,
        **command.calls.supervision,
    )
    prompts = load_prompts_of(command.prompts, model, tokenizer, data=command.data, sampling=command.sampling)
    asked = make_requests(prompts, group_size=command.group_size, seed=command.seed)
    groups = Engine(model, tokenizer, budget=command.budget).generate(asked, sampling=command.sampling)
    pairs = list(pairs_of(groups))
    labels = labeller.label(pairs) if pairs else []
    rows = list(preferences(pairs, labels, name=labeller.name))
    counted = in_words(len(prompts) * command.group_size // 2, labels)
    if not rows:
        raise RewardError(f"no preference was stated: {counted}", where=command.labeller)
    print(f"tether: {counted}", file=sys.stderr)
    write_output(out, "".join(f"{to_json(row)}\n" for row in rows).encode())
    show(str(out))


def in_words(sampled: int, labels: Sequence[Label]) -> str:
    """How many pairs were sampled, how many were blank or equal and so not shown, and which labels the others got.

    >>> in_words(4, ["first", "tie", "first"])
    '4 pairs, 1 blank or equal; first 2, second 0, tie 1, skip 0'
    """
    counts = Counter(labels)
    found = ", ".join(f"{label} {counts[label]}" for label in LABELS)
    return f"{sampled} pairs, {sampled - len(labels)} blank or equal; {found}"
