"""What a policy is worth: reward with its uncertainty, distance from the reference, and how often it wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.rollouts import batch_of, flat, policy_logprobs, reference_logprobs
from tether.models.memory import within_memory
from tether.models.reference import Reference
from tether.ops.divergence import k3
from tether.ops.masked import masked_sum
from tether.rewards.rules import distinct
from tether.types import Generator, Prompt, Sampling, ScoredGroup, Scorer, make_requests


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """Figures over the completions of held-out prompts."""

    prompts: int
    completions: int
    reward: float
    """Mean score."""
    reward_ci95: float
    """Half the width of the mean's 95% interval, over prompts."""
    rewards: dict[str, float]
    """Mean of each part of the reward, over the completions it applies to."""
    kl: float
    """KL(pi || reference), nats per completion: the mean of sum_t k3(d_t)."""
    win_rate: float
    """Share of completions that score above the reference's for the same prompt and seed; ties count half."""
    mean_length: float
    """Emitted tokens per completion."""
    distinct_2: float
    """Distinct word pairs / all word pairs, mean over completions."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def evaluate_policy(
    groups: Sequence[ScoredGroup],
    against: Sequence[ScoredGroup],
    *,
    kl: float,
) -> PolicyEvaluation:
    """Compare the policy's scored ``groups`` with the reference's groups ``against``, sampled for the same prompts with
    the same seed and scored by the same scorer. ``kl`` is the policy's (:func:`policy_kl`)."""
    rows, others = flat(groups), flat(against)
    scores = torch.tensor([[score.total for score in group.scores] for group in groups], dtype=torch.float64)
    rivals = torch.tensor([[score.total for score in group.scores] for group in against], dtype=torch.float64)
    if scores.shape != rivals.shape:
        raise ValueError(f"cannot compare {len(rows)} completions with {len(others)}")
    per_prompt = scores.mean(1)
    spread = float(per_prompt.std()) if len(per_prompt) > 1 else 0.0
    parts: dict[str, float] = {}
    for name in dict.fromkeys(name for _, score in rows for name in score.parts):
        values = [part for _, score in rows if (part := score.parts.get(name)) is not None]
        if values:
            parts[name] = sum(values) / len(values)
    return PolicyEvaluation(
        prompts=len(groups),
        completions=len(rows),
        reward=float(scores.mean()),
        reward_ci95=1.96 * spread / math.sqrt(len(per_prompt)),
        rewards=parts,
        kl=kl,
        win_rate=float(torch.where(scores == rivals, 0.5, (scores > rivals).double()).mean()),
        mean_length=sum(sum(completion.mask) for completion, _ in rows) / len(rows),
        distinct_2=sum(distinct(completion.text, 2) for completion, _ in rows) / len(rows),
    )


def policy_kl(
    groups: Sequence[ScoredGroup],
    *,
    policy: PreTrainedModel,
    reference: Reference,
    temperature: float,
    token_budget: int = 8192,
) -> float:
    """KL(pi || reference) in nats per completion, from the policy's samples.

    The mean over completions of sum_t k3(d_t): each term is an unbiased estimate of the next token's KL at a state that
    the policy visits, and those add up to the KL of completions; unlike k1, none is ever negative.
    """
    batch = batch_of(groups, policy.device)

    def passes(budget: int) -> tuple[Tensor, Tensor]:
        return (
            policy_logprobs(policy, batch, temperature=temperature, token_budget=budget),
            reference_logprobs(reference, batch, temperature=temperature, token_budget=budget),
        )

    (logp, ref_logp), _ = within_memory(passes, token_budget)
    return float(masked_sum(k3(logp - ref_logp), batch.mask, dim=1).mean())


def sample_and_score(
    generator: Generator, scorer: Scorer, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
) -> list[ScoredGroup]:
    """Roll out and score, for an evaluation."""
    asked = make_requests(prompts, group_size=group_size, seed=seed)
    return scorer.score(generator.generate(asked, sampling=sampling))
