"""What a judge is: a language model behind an address, and a rubric, in a YAML file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tether.digests import digest
from tether.errors import ConfigError, RewardError, TetherError
from tether.names import closest, did_you_mean
from tether.rewards.client import address, token_from
from tether.untrusted import read_flat_yaml

CHAT = "/chat/completions"
DEFAULT_OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 1024}


@dataclass(frozen=True, kw_only=True)
class JudgeFile:
    """A judge."""

    url: str
    """Address of an OpenAI-compatible API, such as https://api.openai.com/v1."""
    model: str
    """Name of the model there."""
    rubric: str
    """What is a good answer, and how the score follows from it."""
    pair_rubric: str | None = None
    """What makes one of two answers the better one; the rubric unless given."""
    key_env: str | None = None
    """Environment variable with the API's key."""
    minimum: float = 0.0
    """The lowest score,"""
    maximum: float = 10.0
    """and the highest."""
    pattern: str | None = None
    """Regular expression that finds the score in a reply, by its only group; then the rubric says how to reply. By
    default the reply is a JSON object with the number "score"."""
    columns: tuple[str, ...] = ()
    """Columns of the prompt that the judge is shown, such as a reference answer."""
    options: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_OPTIONS)
    """What else a request holds: temperature, max_tokens, seed."""
    tries: int = 3
    """Times to ask for a reply that can be read."""
    cache: str | None = None
    """Directory for the replies, relative to the file. By default that of the run."""
    input_price: float | None = None
    """Price of a million tokens that are read,"""
    output_price: float | None = None
    """and of a million that are written."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        numbers = [self.minimum, self.maximum, self.input_price or 0.0, self.output_price or 0.0]
        ConfigError.unless(
            self,
            {
                "rubric must not be empty": bool(self.rubric.strip()),
                "minimum and maximum must be finite, and so must prices": all(map(math.isfinite, numbers)),
                "minimum must be below maximum": self.minimum < self.maximum,
                "tries must be at least 1": self.tries >= 1,
                "input_price and output_price must be 0 or more": min(numbers[2:]) >= 0,
                "options must not hold model, messages, n or stream": not {"model", "messages", "n", "stream"}
                & self.options.keys(),
            },
        )
        if self.pattern is not None:
            require_pattern(self.pattern)

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return self.url if self.url.endswith(CHAT) else self.url.rstrip("/") + CHAT

    def fingerprint(self) -> str:
        """Of what decides the scores, wherever the API is."""
        return digest([
            self.model, self.rubric, self.minimum, self.maximum, self.pattern, list(self.columns), dict(self.options)
        ])  # fmt: skip

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """The price of a request; None where no price is given."""
        if self.input_price is None and self.output_price is None:
            return None
        return ((self.input_price or 0.0) * input_tokens + (self.output_price or 0.0) * output_tokens) / 1e6


def require_pattern(pattern: str) -> None:
    """Raise :class:`ConfigError` unless ``pattern`` has one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"pattern is no regular expression ({error})") from None
    if groups != 1:
        raise ConfigError(f"pattern must have one group, for the score; it has {groups}")


def load_judge(path: Path) -> tuple[JudgeFile, str | None]:
    """The judge in a file, and its key. Raises :class:`ConfigError` or :class:`RewardError`, which name the file."""
    try:
        given = read_flat_yaml(path)
        known = {entry.name: entry for entry in fields(JudgeFile)}
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}", hint=did_you_mean(closest(name, list(known))))
        for name, entry in known.items():
            if name not in given and entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{name} is missing")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        judge = JudgeFile(**values)
        address(judge.url)
        if judge.key_env is None:
            return judge, None
        if not os.environ.get(judge.key_env):
            raise RewardError(f"the environment variable {judge.key_env}, with the key of the judge, is not set")
        return judge, token_from(judge.key_env, judge.endpoint)
    except TetherError as error:
        error.at(path)
        raise
