"""The vocabulary of tether: one frozen type for each stage of a step.

    Prompt -> RolloutGroup -> ScoredGroup -> Batch -> (loss)

Generation, scoring and training exchange plain data: token ids, log-probabilities and reasons. Text is carried along
for people and for rules, and nothing is ever recovered from it.

Axes: P prompts a step, G completions of each, B = P * G, S tokens of prompt and completion together, T completion
tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.ops.reduce import length_mask

Metrics = dict[str, float]
"""One row of ``metrics.jsonl``: metric name to value."""

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "Hello"}``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the policy is asked to continue.

    >>> Prompt(ids=(0, 311, 92), text="The cat", columns={"answer": "4"})
    """

    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] | None = None
    """The conversation, when the prompt is one; reward functions then receive it in place of the text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The data row's other columns, handed to reward functions by name."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and when a completion ends."""

    max_new_tokens: int = 64
    """Length limit of a completion, in tokens."""
    min_new_tokens: int = 0
    """No end before this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k_tokens: int = 0
    """Draw from the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability; 1 is off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest; 0 is off."""
    stop: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these strings."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "min_new_tokens must lie in 0..max_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k_tokens must be 0 or more": self.top_k_tokens >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1)": 0 <= self.min_p < 1,
            "stop strings must not be empty": all(self.stop),
        }
        ConfigError.unless(checks)

    @property
    def truncated(self) -> bool:
        """Whether the sampler draws from less than the policy's tempered softmax, so that their log-probs differ."""
        return (
            self.temperature == 0
            or bool(self.top_k_tokens)
            or self.top_p < 1
            or self.min_p > 0
            or self.min_new_tokens > 0
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a rollout may hold at once; it does not change what is sampled."""

    max_rows: int = 512
    """Completions in flight."""
    cache_gib: float | None = None
    """GiB of keys and values; unless given, half of a CUDA device's free memory, or 4 on a CPU."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            {
                "max_rows must be at least 1": self.max_rows >= 1,
                "cache_gib must be positive": self.cache_gib is None or self.cache_gib > 0,
            }
        )


class Finish(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """An end-of-sequence token was emitted; it is the completion's last token."""
    STOP = "stop"
    """A stop string was completed; its last token is the completion's last token."""
    LENGTH = "length"
    """Cut at the length limit: there is no EOS."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the policy emitted, EOS included.

    >>> Completion(ids=(17, 4, 1), logprobs=(-2.1, -0.4, -0.9), finish=Finish.EOS, text=" sat.")
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token under the distribution that sampled it (for temperature 0: under the model at temperature 1)."""
    finish: Finish
    text: str


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """A prompt and its G completions, sampled from one version of the weights."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    weights_version: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a completion was worth.

    >>> Score(total=0.7, parts={"helpful": 0.8, "length": -0.1})
    """

    total: float
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward on its own, before its weight; None where it does not apply."""
    token_rewards: tuple[float, ...] | None = None
    """A reward for each token, adding up to ``total``; None puts the total on the last token."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A rollout group with one score a completion."""

    rollouts: RolloutGroup
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A completion to imitate; the loss falls on ``completion_ids``. A plain text has its first token for a prompt."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two continuations of one prompt, of which the first was preferred."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0


Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts and completions as tensors: each row is its prompt, then its completion, then padding on the right."""

    ids: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64, at least 1
    completion_lengths: Tensor  # [B] int64, at least 1
    prompt_index: Tensor  # [B] int64, equal where rows have one prompt

    @staticmethod
    def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
        """Stack (prompt ids, completion ids) rows."""
        index: dict[tuple[int, ...], int] = {}
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, (prompt, completion) in enumerate(rows):
            row = torch.tensor([*prompt, *completion], dtype=torch.int64)
            ids[i, : len(row)] = row
        return Batch(
            ids=ids.to(device),
            prompt_lengths=torch.tensor([len(p) for p, _ in rows], device=device),
            completion_lengths=torch.tensor([len(c) for _, c in rows], device=device),
            prompt_index=torch.tensor([index.setdefault(tuple(p), len(index)) for p, _ in rows], device=device),
        )

    def __len__(self) -> int:
        return self.ids.size(0)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, [B]."""
        return self.prompt_lengths + self.completion_lengths

    @property
    def mask(self) -> Tensor:
        """[B, T]: True where the policy emitted the token, EOS included."""
        return length_mask(self.completion_lengths, int(self.completion_lengths.max()))

    @property
    def targets(self) -> Tensor:
        """[B, T]: the completion tokens; where the mask is False the value means nothing."""
        return self.ids.gather(1, (self.predictors + 1).clamp(max=self.ids.size(1) - 1))

    @property
    def predictors(self) -> Tensor:
        """[B, T]: the position in ``ids`` whose output predicts completion token t, that is, where s_t is read."""
        t = torch.arange(int(self.completion_lengths.max()), device=self.ids.device)
        last = self.lengths.unsqueeze(1) - 2
        return torch.minimum(self.prompt_lengths.unsqueeze(1) - 1 + t, last)

    def rows(self, index: Tensor) -> Batch:
        """The rows at ``index``, trimmed to their own longest."""
        lengths = self.lengths[index]
        return Batch(
            ids=self.ids[index, : int(lengths.max())],
            prompt_lengths=self.prompt_lengths[index],
            completion_lengths=self.completion_lengths[index],
            prompt_index=self.prompt_index[index],
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step of an algorithm leaves behind: its metrics, and the rollouts they came from."""

    metrics: Metrics
    groups: tuple[ScoredGroup, ...]


class Generator(Protocol):
    """Anything that continues prompts: the engine in this process, a server, a group of remote actors."""

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        """``group_size`` completions of each prompt; completion j of prompt i depends on (seed, i, j) alone."""
        ...

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace all weights or none; the next rollout carries ``version``."""
        ...

    def figures(self) -> Metrics:
        """What the last call of :meth:`generate` cost, as ``sampling/...``; a generator that cannot tell gives none."""
        ...


class Scorer(Protocol):
    """Anything that scores completions. A failure raises; it is never a zero."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]: ...
