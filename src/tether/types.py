"""The vocabulary of tether: one frozen type per stage of a step.

    Prompt -> Request -> RolloutGroup -> ScoredGroup -> Batch -> (loss)

Generation, scoring and training exchange plain data: token ids, masks, log-probabilities and finish reasons. Text is
kept for logs and for rule-based rewards; tokens are never recovered from it.

Axes: P prompts per step, G completions per prompt, B = P * G, S tokens of prompt and completion together, T completion
tokens, V vocabulary, D model width.

A mask is True where the policy emitted the token, EOS included. The generator makes it; it is never derived from ids or
lengths. Tokens that an environment put between the policy's turns are False: they are context, excluded from the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tether.errors import ConfigError
from tether.ops.reduce import length_mask
from tether.seeds import derive_seed

Metrics = dict[str, float]
"""One row of ``metrics.jsonl``: metric name to value."""

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "Hello"}``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the policy is asked to continue.

    >>> prompt = Prompt(ids=(0, 311, 92), text="The cat", columns={"answer": "4"})
    """

    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] | None = None
    """The conversation, when the prompt is one; reward functions then receive it in place of the text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The data row's other columns, passed to reward functions by name."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue, with one seed per completion.

    A completion depends only on the weights, its prompt, the sampling options and its own seed, so requests can be
    split, reordered, or sent elsewhere without changing what is sampled.
    """

    prompt: Prompt
    seeds: tuple[int, ...]


def make_requests(prompts: Sequence[Prompt], *, group_size: int, seed: int, first: int = 0) -> list[Request]:
    """One request per prompt; completion j of prompt i has the seed ``derive_seed(seed, first + i, j)``.

    ``first`` is the number of the first prompt among those of the whole step, where several ranks share it.
    """
    return [
        Request(prompt=prompt, seeds=tuple(derive_seed(seed, i, j) for j in range(group_size)))
        for i, prompt in enumerate(prompts, first)
    ]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and when a completion ends."""

    max_new_tokens: int = 64
    """Length limit of a completion, in tokens."""
    min_new_tokens: int = 0
    """Minimum length of a completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature: logits are divided by it, in training too. 0 takes the most likely token."""
    top_k_tokens: int = 0
    """Top-k sampling: draw from the k most likely tokens only; 0 is off."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with this much probability; 1 is off."""
    min_p: float = 0.0
    """Min-p: leave out tokens less likely than this share of the most likely one; 0 is off."""
    stop: tuple[str, ...] = ()
    """Stop strings: a completion ends with the token that completes one of them. By default there are none."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "min_new_tokens must lie in 0..max_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k_tokens must be 0 or more": self.top_k_tokens >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1)": 0 <= self.min_p < 1,
            "stop strings must not be empty": all(self.stop),
        }
        ConfigError.unless(self, checks)

    @property
    def cuts_support(self) -> bool:
        """Whether some tokens cannot be drawn in any state, however the policy changes: by top-k, top-p or min-p."""
        return bool(self.top_k_tokens) or self.top_p < 1 or self.min_p > 0

    @property
    def truncated(self) -> bool:
        """Whether the sampler draws from less than the policy's tempered softmax, so that their log-probs differ."""
        return self.temperature == 0 or self.cuts_support or self.min_new_tokens > 0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory limits of a rollout; they do not change what is sampled."""

    max_rows: int = 512
    """Maximum number of completions in flight."""
    cache_gib: float | None = None
    """GiB of the key-value cache. By default half of a CUDA device's free memory, or 4 on a CPU."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "max_rows must be at least 1": self.max_rows >= 1,
                "cache_gib must be positive": self.cache_gib is None or self.cache_gib > 0,
            },
        )


class FinishReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """An end-of-sequence token was emitted; it is the completion's last token."""
    STOP = "stop"
    """A stop string was completed; the token that completed it is the completion's last token."""
    LENGTH = "length"
    """Cut at the length limit, where there is no EOS; or an episode at a limit, before its environment ended it."""
    DONE = "done"
    """The environment ended the episode."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of the policy in an episode, and what the environment said of it."""

    start: int
    stop: int
    """Its tokens are ``completion.ids[start:stop]``, at least one, all emitted by the policy."""
    reward: float
    info: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The tokens that follow a prompt. ``ids``, ``mask`` and ``sampler_logp`` have one entry per token.

    >>> completion = Completion(
    ...     ids=(17, 4, 1),
    ...     mask=(True, True, True),
    ...     sampler_logp=(-2.1, -0.4, -0.9),
    ...     finish_reason=FinishReason.EOS,
    ...     text=" sat.",
    ...     weights_version=3,
    ... )
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """True where the policy emitted the token, EOS included; False where an environment did."""
    sampler_logp: tuple[float, ...]
    """log-prob of each token under the distribution it was drawn from (temperature 0: the model's, at temperature 1);
    0 where the policy did not emit it."""
    finish_reason: FinishReason
    text: str
    weights_version: int
    """Version of the weights that sampled it."""
    routes: tuple[int, ...] | None = None
    """Of each token, a number for the experts that the state it was drawn from got (:mod:`tether.models.routes`); None
    where the model has no experts or the generator does not say."""
    turns: tuple[Turn, ...] = ()
    """The policy's turns, if the completion is an episode; else none."""
    messages: tuple[Message, ...] | None = None
    """An episode that continues a conversation, as messages: the policy's and those of the environment between them."""

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.mask) == len(self.sampler_logp):
            raise ValueError("ids, mask and sampler_logp of a completion must have one entry per token")
        if self.routes is not None and len(self.routes) != len(self.ids):
            raise ValueError("routes of a completion must have one entry per token")
        if not any(self.mask):
            raise ValueError("a completion must hold a token that the policy emitted")

    @property
    def last_emitted(self) -> int:
        """Index of the last token that the policy emitted."""
        return len(self.mask) - 1 - self.mask[::-1].index(True)


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """A prompt and its G completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a completion.

    >>> score = Score(total=0.7, parts={"helpful": 0.8, "length": -0.1})
    """

    total: float | None
    """None where no reward applies to the completion: it then has no advantage, and is no part of a baseline."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward separately, before its weight; None where it does not apply."""
    token_rewards: tuple[float, ...] | None = None
    """One reward per token, adding up to ``total``, 0 where the policy did not emit the token; None puts the total on
    the last token that the policy emitted."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """Metrics that its rewards logged (:mod:`tether.rewards.logged`), of the call or of this completion."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """What its rewards logged for this completion."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A rollout group with one score per completion."""

    rollouts: RolloutGroup
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A completion to imitate; the loss covers ``completion_ids``. In plain text, the first token is the prompt."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...] | None = None
    """True where the token is to be imitated, False where an environment emitted it; None imitates every token."""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two continuations of one prompt, of which the first was preferred."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0


PromptCompletion = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


HOST: Mapping[str, bool] = {"host": True}
"""Metadata of a field whose tensor stays on the host, wherever the others are."""
UNSAVED: Mapping[str, bool] = {"unsaved": True}
"""Metadata of a field that checkpoints do not hold: it has its default value when its dataclass is restored."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts and completions as tensors: each row is its prompt, then its completion, then padding on the right.

    ``ids`` and ``mask`` are on the model's device. Lengths and ``prompt_index`` decide shapes, so they stay on the
    host, where reading them needs no synchronisation.
    """

    ids: Tensor  # [B, S] int64
    mask: Tensor  # [B, T] bool: True where the policy emitted the completion token; False at padding
    prompt_lengths: Tensor = field(metadata=HOST)  # [B] int64; 0 only where no state before a token is read
    completion_lengths: Tensor = field(metadata=HOST)  # [B] int64, at least 1: all tokens after the prompt
    prompt_index: Tensor = field(metadata=HOST)  # [B] int64, equal where rows have one prompt
    routes: Tensor | None = None  # [B, T] int64, of the sampler, where it says; arbitrary where the mask is False

    @staticmethod
    def collate(
        rows: Sequence[PromptCompletion],
        device: torch.device | str = "cpu",
        *,
        masks: Sequence[Sequence[bool]] | None = None,
        routes: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """Stack (prompt ids, completion ids) rows; without ``masks`` the policy emitted, or imitates, every token."""
        index: dict[tuple[int, ...], int] = {}
        width = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, (prompt, completion) in enumerate(rows):
            row = torch.tensor([*prompt, *completion], dtype=torch.int64)
            ids[i, : len(row)] = row
        lengths = torch.tensor([len(c) for _, c in rows])
        mask = length_mask(lengths, int(lengths.max()))
        if masks is not None:
            mask[mask.clone()] = torch.tensor([emitted for row in masks for emitted in row])
        return Batch(
            ids=ids.to(device),
            mask=mask.to(device),
            prompt_lengths=torch.tensor([len(p) for p, _ in rows]),
            completion_lengths=lengths,
            prompt_index=torch.tensor([index.setdefault(tuple(p), len(index)) for p, _ in rows]),
            routes=None if routes is None else pad_sequence([torch.tensor(row) for row in routes], True).to(device),
        )

    def __len__(self) -> int:
        return self.ids.size(0)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, [B], host."""
        return self.prompt_lengths + self.completion_lengths

    @property
    def targets(self) -> Tensor:
        """[B, T]: the completion tokens; arbitrary at padding."""
        return self.ids.gather(1, (self.predictors + 1).clamp(max=self.ids.size(1) - 1))

    @property
    def predictors(self) -> Tensor:
        """[B, T]: the position in ``ids`` whose output predicts completion token t, that is, where s_t is read."""
        t = torch.arange(self.mask.size(1))
        last = self.lengths.unsqueeze(1) - 2
        return torch.minimum(self.prompt_lengths.unsqueeze(1) - 1 + t, last).to(self.ids.device)

    def rows(self, index: Tensor) -> Batch:
        """The rows at ``index`` (host), trimmed to the longest of them."""
        prompt_lengths, completion_lengths = self.prompt_lengths[index], self.completion_lengths[index]
        return Batch(
            ids=self.ids[index, : int((prompt_lengths + completion_lengths).max())],
            mask=self.mask[index, : int(completion_lengths.max())],
            prompt_lengths=prompt_lengths,
            completion_lengths=completion_lengths,
            prompt_index=self.prompt_index[index],
            routes=None if self.routes is None else self.routes[index, : int(completion_lengths.max())],
        )


@dataclass(frozen=True, kw_only=True)
class CompletionFigures:
    """What an algorithm computed for each token of a completion; 0 where the policy did not emit it."""

    ref_logp: tuple[float, ...]
    """log-prob under the reference."""
    advantages: tuple[float, ...] | None = None
    """The advantage; None where the algorithm has none."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one step of an algorithm: its metrics, and the rollouts they came from, if any."""

    metrics: Metrics
    groups: tuple[ScoredGroup, ...] = ()
    figures: tuple[tuple[CompletionFigures, ...], ...] = ()
    """One per completion of ``groups``, in their order; empty where nothing is known."""


class Generator(Protocol):
    """Anything that continues prompts: the engine in this process, a server, a group of remote actors."""

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        """One group per request, with one completion per seed, in their order."""
        ...

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the trainable weights (:func:`tether.models.trainable.trainable`): all of them or none. Completions
        sampled afterwards have this ``version``."""
        ...

    def figures(self) -> Metrics:
        """The cost of the last call of :meth:`generate`, as ``sampling/...``; empty if the generator cannot tell."""
        ...


class Scorer(Protocol):
    """Anything that scores completions. A failure raises; it is never a zero."""

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]: ...
