"""The optima that the options of a loss imply, in closed form or by iteration, on a space that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from enumerable import EOS, Space

Optimum = Callable[[Space, Tensor], Tensor]
"""From a space and the reference's log-probs [n] to a distribution [n]."""


def plain(beta: float) -> Optimum:
    """pi_ref exp(r / beta) / Z."""
    return lambda space, reference: space.reverse_optimum(reference, beta)


def fixed_point(value: Callable[[Space, Tensor], Tensor], beta: float) -> Optimum:
    """pi = pi_ref exp(value(pi) / beta) / Z, for a value of each completion that depends on pi, by iteration."""

    def optimum(space: Space, reference: Tensor) -> Tensor:
        pi = reference.exp()
        for _ in range(500):
            pi = (pi + (reference + value(space, pi) / beta).softmax(0)) / 2
        return pi

    return optimum


def above_the_mean(space: Space, pi: Tensor) -> Tensor:
    """max(r - E[r], 0)."""
    return (space.rewards - (pi * space.rewards).sum()).clamp(min=0)


def best_of(k: int) -> Callable[[Space, Tensor], Tensor]:
    """E[max(r, the best of k - 1 other draws)]."""

    def value(space: Space, pi: Tensor) -> Tensor:
        order = space.rewards.argsort()
        at_most = pi[order].cumsum(0) ** (k - 1)
        chance = at_most.diff(prepend=torch.zeros(1, dtype=pi.dtype))  # of each as the best of k - 1
        return (torch.maximum(space.rewards.unsqueeze(1), space.rewards[order].unsqueeze(0)) * chance).sum(1)

    return value


def with_entropy(alpha: float, beta: float) -> Optimum:
    """With a bonus ``alpha`` of each state's own entropy, whose gradient leaves out that a token decides which states
    come later. From the last token back, with Q the value without the entropy of later states,

        pi(a | s) = (pi_ref(a | s)^beta exp(Q(s, a)))^(1 / (alpha + beta)) / Z(s).
    """

    def optimum(space: Space, reference: Tensor) -> Tensor:
        logp_of = dict(zip(space.completions, reference, strict=True))
        reward_of = dict(zip(space.completions, space.rewards, strict=True))

        def solve(before: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[tuple[int, ...], Tensor]]:
            """Of the state after ``before``: its value, the reference's log-prob of it, and log pi of what follows."""
            if before in logp_of:
                return reward_of[before], logp_of[before], {before: torch.zeros(())}
            after = [
                solve((*before, a))
                for a in sorted({ids[len(before)] for ids in logp_of if ids[: len(before)] == before})
            ]
            values, mass = torch.stack([one[0] for one in after]), torch.stack([one[1] for one in after])
            ref = mass - mass.logsumexp(0)
            logp = ((beta * ref + values) / (alpha + beta)).log_softmax(0)
            value = (logp.exp() * (values - beta * (logp - ref))).sum()
            rest = {ids: step + more for step, one in zip(logp, after, strict=True) for ids, more in one[2].items()}
            return value, mass.logsumexp(0), rest

        found = solve(())[2]
        return torch.stack([found[ids] for ids in space.completions]).exp()

    return optimum


def among_ended(space: Space, pi: Tensor) -> Tensor:
    """A distribution among the completions that end with EOS."""
    ended = torch.tensor([ids[-1] == EOS for ids in space.completions])
    return torch.where(ended, pi, torch.zeros_like(pi)) / pi[ended].sum()
