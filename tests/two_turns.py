"""A game of two turns with an environment between them, small enough to enumerate every trajectory.

The policy emits a turn, the environment answers with tokens that depend on it, and the policy emits another turn. EOS
ends a completion in either turn. One completion holds all of it, with a mask that is False on the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from enumerable import EOS
from tether.generation.sampling import draw, log_distribution, uniforms
from tether.models.policy import policy_logits, replace_weights
from tether.types import Completion, FinishReason, Metrics, Request, RolloutGroup, Sampling

Trajectory = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids, and True where the policy emitted them."""


def answer(turn: Sequence[int]) -> tuple[int, ...]:
    """What the environment says: one token or two, of 3 to 7."""
    return (3 + sum(turn) % 5,) * (1 + sum(turn) % 2)


def trajectories(vocab: int, turn: int) -> list[Trajectory]:
    """Every completion of two turns of at most ``turn`` tokens, for a vocabulary of at least 8."""
    turns = [
        ids
        for n in range(1, turn + 1)
        for ids in itertools.product(range(vocab), repeat=n)
        if EOS not in ids[:-1] and (n == turn or ids[-1] == EOS)
    ]
    over = [(first, (True,) * len(first)) for first in turns if first[-1] == EOS]
    return over + [
        (
            (*first, *answer(first), *second),
            (True,) * len(first) + (False,) * len(answer(first)) + (True,) * len(second),
        )
        for first in turns
        if first[-1] != EOS
        for second in turns
    ]


class TwoTurns:
    """A :class:`tether.types.Generator` of such completions; ``sampling.max_new_tokens`` is the limit of each turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.version = model, 0

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        distributions: dict[tuple[int, ...], Tensor] = {}
        return [
            RolloutGroup(
                prompt=request.prompt,
                completions=tuple(
                    self.complete(request.prompt.ids, seed, sampling, distributions) for seed in request.seeds
                ),
            )
            for request in requests
        ]

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        replace_weights(self.model, weights)
        self.version = version

    def figures(self) -> Metrics:
        return {}

    def complete(
        self, prompt: Sequence[int], seed: int, sampling: Sampling, distributions: dict[tuple[int, ...], Tensor]
    ) -> Completion:
        ids: list[int] = []
        mask: list[bool] = []
        sampler_logp: list[float] = []
        u = uniforms(seed, 2 * sampling.max_new_tokens)
        turns = 0
        while turns < 2 and ids[-1:] != [EOS]:
            if turns:
                said = answer(ids)
                ids += said
                mask += [False] * len(said)
                sampler_logp += [0.0] * len(said)
            for _ in range(sampling.max_new_tokens):
                logp = self.distribution((*prompt, *ids), sampling, distributions)
                token = draw(logp, u[sum(mask)].unsqueeze(0), greedy=sampling.temperature == 0)
                ids.append(int(token))
                mask.append(True)
                sampler_logp.append(float(logp[0, token]))
                if ids[-1] == EOS:
                    break
            turns += 1
        return Completion(
            ids=tuple(ids),
            mask=tuple(mask),
            sampler_logp=tuple(sampler_logp),
            finish_reason=FinishReason.EOS if ids[-1] == EOS else FinishReason.LENGTH,
            text="",
            weights_version=self.version,
        )

    @torch.no_grad()
    def distribution(
        self, context: tuple[int, ...], sampling: Sampling, known: dict[tuple[int, ...], Tensor]
    ) -> Tensor:
        """log-probs of the next token, [1, V]; contexts are few, so the model runs once on each."""
        if context not in known:
            logits = policy_logits(self.model, torch.tensor([context]))[:, -1]
            known[context] = log_distribution(logits, sampling, step=torch.zeros(1), ends=torch.tensor([EOS]))
        return known[context]
