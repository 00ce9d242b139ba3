"""What an update learns from: completions, and tensors of their rows, without gradient; and what that says of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from tether.types import Batch, CompletionFigures, ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Completions as a batch, and the log-probs of their tokens, [B, T] each, 0 where the policy did not emit one."""

    batch: Batch
    learned: Tensor  # [B] bool, whether the loss applies to the completion
    sampler_logp: Tensor
    """Log-probs that the tokens were drawn with."""
    old_logp: Tensor
    """Log-probs under the policy at the start of the update."""
    ref_logp: Tensor
    """Log-probs under the reference."""

    @property
    def loss_mask(self) -> Tensor:
        """Emitted tokens that the loss applies to, [B, T] bool."""
        return self.batch.mask & self.learned.unsqueeze(1)

    def rows(self, index: Tensor) -> Sampled:
        """The rows at ``index``, trimmed to the longest of them."""
        batch = self.batch.rows(index)
        width = batch.mask.size(1)
        return Sampled(
            batch=batch,
            learned=self.learned[index],
            sampler_logp=self.sampler_logp[index, :width],
            old_logp=self.old_logp[index, :width],
            ref_logp=self.ref_logp[index, :width],
        )


class Experience(Protocol):
    """The data of one update: completions, and tensors of their rows, without gradient."""

    @property
    def sampled(self) -> Sampled: ...

    def rows(self, index: Tensor) -> Self:
        """The rows at ``index``, trimmed to the longest of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenExperience:
    """PPO's, with an advantage per token. All are [B, T], 0 where the policy did not emit the token."""

    sampled: Sampled
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> TokenExperience:
        """The rows at ``index``, trimmed to the longest of them."""
        sampled = self.sampled.rows(index)
        width = sampled.batch.mask.size(1)
        return TokenExperience(
            sampled=sampled,
            values=self.values[index, :width],
            advantages=self.advantages[index, :width],
            returns=self.returns[index, :width],
        )


@dataclass(frozen=True, kw_only=True)
class GroupExperience:
    """GRPO's, with an advantage per completion."""

    sampled: Sampled
    advantages: Tensor  # [B]
    kl_weight: Tensor  # [B], of each completion's KL term in the loss

    def rows(self, index: Tensor) -> GroupExperience:
        """The rows at ``index``, trimmed to the longest of them."""
        return GroupExperience(
            sampled=self.sampled.rows(index), advantages=self.advantages[index], kl_weight=self.kl_weight[index]
        )


def group_figures(
    groups: Sequence[ScoredGroup], experience: GroupExperience
) -> tuple[tuple[CompletionFigures, ...], ...]:
    """Figures of the tokens of each completion of GRPO's step; the advantage is the completion's, at each of them."""
    advantages = experience.advantages.unsqueeze(1) * experience.sampled.batch.mask
    return completion_figures(groups, experience.sampled.ref_logp.tolist(), advantages.tolist())


def token_figures(
    groups: Sequence[ScoredGroup], experience: TokenExperience, left_out: Tensor | None
) -> tuple[tuple[CompletionFigures, ...], ...]:
    """Figures of the tokens of each completion of PPO's step; ``left_out`` [N, T] are the log-probs under the reference
    of the completions that the experience leaves out, because no reward applies to them: they have no advantage."""
    kept = zip(experience.sampled.ref_logp.tolist(), experience.advantages.tolist(), strict=True)
    others = iter([] if left_out is None else left_out.tolist())
    rows = [(next(others), None) if score.total is None else next(kept) for group in groups for score in group.scores]
    return completion_figures(groups, *zip(*rows, strict=True))


def completion_figures(
    groups: Sequence[ScoredGroup],
    ref_logp: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float] | None],
) -> tuple[tuple[CompletionFigures, ...], ...]:
    """The figures of each completion's tokens, in the shape of ``groups``, from rows in the order of a batch, which may
    be longer than their completion."""
    rows = zip(ref_logp, advantages, strict=True)

    def of_group(group: ScoredGroup) -> Iterator[CompletionFigures]:
        for completion in group.rollouts.completions:
            length, (reference, advantage) = len(completion.ids), next(rows)
            yield CompletionFigures(
                ref_logp=tuple(reference[:length]),
                advantages=None if advantage is None else tuple(advantage[:length]),
            )

    return tuple(tuple(of_group(group)) for group in groups)
