"""What a policy is worth: reward with its uncertainty, distance from the reference, and how often it wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.rollouts import batch_of, flat, policy_logprobs, reference_logprobs
from tether.errors import ConfigError, RewardError
from tether.models.loading import context_length, embedding_rows
from tether.models.memory import within_memory
from tether.models.reference import Reference
from tether.ops.advantages import group_mean
from tether.ops.divergence import k3
from tether.ops.masked import masked_sum
from tether.rewards.text_rules import distinct
from tether.runtime.files import write_table
from tether.statistics import mean_interval
from tether.types import Generator, Prompt, Sampling, ScoredGroup, Scorer, make_requests


@dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """Figures over the completions of held-out prompts. Completions to which no reward applies count in lengths, KL and
    ``distinct_2`` alone."""

    prompts: int
    completions: int
    completions_without_reward: int
    """Completions to which no reward applies."""
    reward: float
    """Mean score."""
    reward_ci95: float
    """Half the width of the mean's 95% interval, over prompts with a score, by Student's t; 0 where there is one."""
    rewards: dict[str, float]
    """Mean of each part of the reward, over the completions it applies to."""
    kl: float
    """KL(pi || reference), nats per completion: the mean of sum_t k3(d_t)."""
    win_rate: float
    """Share of completions that score above the reference's for the same prompt and seed, where both have a score; ties
    count half."""
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
    the same seed and scored by the same scorer. ``kl`` is the policy's (:func:`policy_kl`).

    Raises :class:`RewardError` where no reward applies to any completion, or none to a completion of both.
    """
    rows, others = flat(groups), flat(against)
    (scores, applies), (rivals, others_apply) = totals_of(groups), totals_of(against)
    if scores.shape != rivals.shape:
        raise ValueError(f"cannot compare {len(rows)} completions with {len(others)}")
    compared = applies & others_apply
    if not compared.any():
        raise RewardError("no reward applies to any completion of the evaluation, or of what it is compared with")
    per_prompt = group_mean(scores, None if applies.all() else applies)[applies.any(1)]
    wins = torch.where(scores == rivals, 0.5, (scores > rivals).double())
    half = mean_interval(per_prompt.flatten().tolist()).half_width if len(per_prompt) > 1 else 0.0
    parts: dict[str, float] = {}
    for name in dict.fromkeys(name for _, score in rows for name in score.parts):
        values = [part for _, score in rows if (part := score.parts.get(name)) is not None]
        if values:
            parts[name] = sum(values) / len(values)
    return PolicyEvaluation(
        prompts=len(groups),
        completions=len(rows),
        completions_without_reward=int((~applies).sum()),
        reward=float(scores[applies].mean()),
        reward_ci95=half,
        rewards=parts,
        kl=kl,
        win_rate=float(wins[compared].mean()),
        mean_length=sum(sum(completion.mask) for completion, _ in rows) / len(rows),
        distinct_2=sum(distinct(completion.text, 2) for completion, _ in rows) / len(rows),
    )


def totals_of(groups: Sequence[ScoredGroup]) -> tuple[Tensor, Tensor]:
    """Total scores, [P, G] float64, and where a reward applies, [P, G] bool; the score is 0 elsewhere."""
    totals = [[score.total for score in group.scores] for group in groups]
    return (
        torch.tensor([[total or 0.0 for total in row] for row in totals], dtype=torch.float64),
        torch.tensor([[total is not None for total in row] for row in totals]),
    )


def completion_kl(
    groups: Sequence[ScoredGroup],
    *,
    policy: PreTrainedModel,
    reference: Reference,
    temperature: float,
    token_budget: int = 8192,
) -> Tensor:
    """sum_t k3(d_t) of each completion of the policy, [B] float32 on the host, in the row order of the groups.

    Each term is an unbiased estimate of the next token's KL(pi || reference) at a state that the policy visits, and
    those add up to the KL of completions; unlike k1, none is ever negative.
    """
    batch = batch_of(groups, policy.device)

    def passes(budget: int) -> tuple[Tensor, Tensor]:
        return (
            policy_logprobs(policy, batch, temperature=temperature, token_budget=budget),
            reference_logprobs(reference, batch, temperature=temperature, token_budget=budget),
        )

    (logp, ref_logp), _ = within_memory(passes, token_budget)
    return masked_sum(k3(logp - ref_logp), batch.mask, dim=1).cpu()


def policy_kl(
    groups: Sequence[ScoredGroup],
    *,
    policy: PreTrainedModel,
    reference: Reference,
    temperature: float,
    token_budget: int = 8192,
) -> float:
    """KL(pi || reference) in nats per completion, from the policy's samples: the mean of :func:`completion_kl`."""
    found = completion_kl(
        groups, policy=policy, reference=reference, temperature=temperature, token_budget=token_budget
    )
    return float(found.mean())


EVALUATION = "evaluation.parquet"
"""The held-out completions of a run, in its directory."""


def write_evaluation(
    directory: Path,
    policy: Sequence[ScoredGroup],
    reference: Sequence[ScoredGroup],
    kl: Sequence[float] | Tensor,
    *,
    seed: int,
) -> None:
    """Write :data:`EVALUATION` into a run directory, or replace it: :func:`evaluation_table` of the arguments."""
    write_table(directory / EVALUATION, evaluation_table(policy, reference, kl, seed=seed))


def evaluation_table(
    policy: Sequence[ScoredGroup], reference: Sequence[ScoredGroup], kl: Sequence[float] | Tensor, *, seed: int
) -> Any:
    """The held-out completions of a policy and of its reference as a ``pyarrow.Table``, one row per completion.

    Both have one group per prompt, in the same order. ``kl`` is that of each of the policy's completions, in nats
    (:func:`completion_kl`), and ``seed`` the one that the seeds of all completions are derived from. Its types do not
    depend on the values.
    """
    import pyarrow

    kl = [float(value) for value in kl]
    parts = dict.fromkeys(name for _, score in [*flat(policy), *flat(reference)] for name in score.parts)
    types = {
        "model": pyarrow.string(),
        "prompt_index": pyarrow.int64(),
        "completion_index": pyarrow.int64(),
        "seed": pyarrow.int64(),
        "prompt": pyarrow.string(),
        "completion": pyarrow.string(),
        "score": pyarrow.float64(),
        **{f"rewards/{name}": pyarrow.float64() for name in parts},
        "kl": pyarrow.float64(),
        "length": pyarrow.int64(),
        "finish_reason": pyarrow.string(),
    }
    rows = [
        *evaluation_rows("policy", policy, kl, list(parts), seed=seed),
        *evaluation_rows("reference", reference, [0.0] * len(flat(reference)), list(parts), seed=seed),
    ]
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(types.items())))


def evaluation_rows(
    model: str, groups: Sequence[ScoredGroup], kl: Sequence[float], parts: Sequence[str], *, seed: int
) -> list[dict[str, Any]]:
    """The rows of one model, prompt by prompt; a part that does not apply to a completion is None there."""
    places = [(i, j, group) for i, group in enumerate(groups) for j in range(len(group.scores))]
    return [
        {
            "model": model,
            "prompt_index": i,
            "completion_index": j,
            "seed": seed,
            "prompt": group.rollouts.prompt.text,
            "completion": group.rollouts.completions[j].text,
            "score": group.scores[j].total,
            **{f"rewards/{name}": group.scores[j].parts.get(name) for name in parts},
            "kl": one,
            "length": sum(group.rollouts.completions[j].mask),
            "finish_reason": group.rollouts.completions[j].finish_reason.value,
        }
        for (i, j, group), one in zip(places, kl, strict=True)
    ]


def require_comparable(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, where: str
) -> None:
    """Raise :class:`ConfigError` where the reference at ``where`` cannot read what the policy ``model`` may write: an
    id without an embedding, or more tokens than its context."""
    own, read = embedding_rows(model), embedding_rows(reference)
    if read < own:
        raise ConfigError(
            f"its embedding has {read} rows, and the model may emit ids up to {own - 1}, so they have no KL",
            where=where,
        )
    needed = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    if needed > context_length(reference):
        raise ConfigError(
            f"the longest prompt and {max_new_tokens} new tokens take {needed}, and its context is "
            f"{context_length(reference)}",
            where=where,
            hint="lower max_new_tokens, or leave long prompts out",
        )


def sample_and_score(
    generator: Generator, scorer: Scorer, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
) -> list[ScoredGroup]:
    """Roll out and score, for an evaluation."""
    asked = make_requests(prompts, group_size=group_size, seed=seed)
    return scorer.score(generator.generate(asked, sampling=sampling))
