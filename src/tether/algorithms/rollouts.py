"""From scored groups to the tensors that PPO and GRPO share, and to the metrics of the rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.experience import Sampled
from tether.algorithms.optimise import require_finite
from tether.algorithms.pending import Rollouts
from tether.algorithms.phases import PhaseClock
from tether.data.batching import micro_batches
from tether.errors import RewardError, TetherError
from tether.figures import Figures, Max, Mean, Min, Std, Sum
from tether.models.checks import stated_context
from tether.models.flops import Lengths
from tether.models.loading import embedding_rows
from tether.models.policy import completion_logprobs
from tether.models.reference import Reference
from tether.ops.advantages import zero_variance
from tether.ops.masked import masked_mean
from tether.stop_requests import anywhere, stoppable
from tether.types import (
    Batch,
    Completion,
    FinishReason,
    Generator,
    Prompt,
    Request,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Scorer,
    make_requests,
)
from tether.world import World

CUTS_SUPPORT = (
    "top_p, top_k_tokens and min_p are for sampling only: in training, tokens outside of the kept set are never drawn, "
    "lose probability at every step and never come back; leave them out, or give --allow-truncated-sampling"
)
"""Why a policy is not trained on samples from a truncated distribution."""


def flat(groups: Sequence[ScoredGroup]) -> list[tuple[Completion, Score]]:
    """Completion and score of every row, prompt by prompt: the row order of a batch."""
    return [pair for group in groups for pair in zip(group.rollouts.completions, group.scores, strict=True)]


def first_of(prompts: Sequence[Prompt], world: World) -> int:
    """The number of this rank's first prompt among those of all ranks, so that no two completions share a seed."""
    return sum(world.gather(len(prompts))[: world.rank])


def roll_out(
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    policy: PreTrainedModel,
    group_size: int,
    sampling: Sampling,
    seed: int,
    first: int,
    clock: PhaseClock,
) -> list[ScoredGroup]:
    """``group_size`` scored completions of each prompt, whose numbers in the step begin at ``first``, for the training
    of ``policy``."""
    with clock.phase("generate"), anywhere():
        asked = make_requests(prompts, group_size=group_size, seed=seed, first=first)
        rollouts = generator.generate(asked, sampling=sampling)
        require_answers(asked, rollouts, vocabulary=embedding_rows(policy), context=stated_context(policy))
    with clock.phase("score"), anywhere():
        return scorer.score(rollouts)


def roll_out_all(
    prompts: Sequence[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    policy: PreTrainedModel,
    group_size: int,
    sampling: Sampling,
    seed: int,
    world: World,
) -> Rollouts:
    """The rollouts of a step: those of :func:`roll_out`, the generator's figures, and how long both took."""
    clock = PhaseClock(policy.device)
    groups = roll_out(
        prompts,
        generator=generator,
        scorer=scorer,
        policy=policy,
        group_size=group_size,
        sampling=sampling,
        seed=seed,
        first=first_of(prompts, world),
        clock=clock,
    )
    return Rollouts(groups=tuple(groups), figures=generator_figures(generator), clock=clock)


def require_answers(
    asked: Sequence[Request], rollouts: Sequence[RolloutGroup], *, vocabulary: int, context: int | None
) -> None:
    """Raise :class:`TetherError` unless there is one group per request, in their order, with a completion per seed, and
    a policy with this ``vocabulary`` and ``context``, in tokens, can read all of them."""
    if len(rollouts) != len(asked):
        raise TetherError(f"the generator gave {len(rollouts)} groups for {len(asked)} requests")
    for number, (request, group) in enumerate(zip(asked, rollouts, strict=True)):
        episodes = any(completion.turns for completion in group.completions)  # a reset may show something first
        if group.prompt.ids != request.prompt.ids and not episodes:
            raise TetherError(f"the generator gave another prompt's completions for request {number}")
        if len(group.completions) != len(request.seeds):
            raise TetherError(
                f"the generator gave {len(group.completions)} completions for the {len(request.seeds)} seeds of "
                f"request {number}"
            )
        for completion in group.completions:
            length = len(group.prompt.ids) + len(completion.ids)
            if context is not None and length > context:
                raise TetherError(
                    f"the generator gave a completion of request {number} with which it has {length} tokens, and the "
                    f"policy's context is {context}"
                )
            if min(completion.ids) < 0 or max(completion.ids) >= vocabulary:
                wrong = next(i for i in completion.ids if not 0 <= i < vocabulary)
                raise TetherError(
                    f"the generator gave the token id {wrong} for request {number}, and the policy has embeddings for "
                    f"ids from 0 to {vocabulary - 1} alone"
                )


def batch_of(groups: Sequence[ScoredGroup], device: torch.device) -> Batch:
    """The groups' prompts and completions as a batch of P * G rows."""
    rows = [(g.rollouts.prompt.ids, c.ids) for g in groups for c in g.rollouts.completions]
    completions = [completion for completion, _ in flat(groups)]
    routes = [c.routes for c in completions if c.routes is not None]
    return Batch.collate(
        rows,
        device,
        masks=[c.mask for c in completions],
        routes=routes if len(routes) == len(rows) else None,
    )


def lengths_of(groups: Sequence[ScoredGroup]) -> Lengths:
    """Lengths in tokens of each group's prompt and of its completions."""
    return [(len(g.rollouts.prompt.ids), [len(c.ids) for c in g.rollouts.completions]) for g in groups]


def scored(groups: Sequence[ScoredGroup]) -> list[tuple[Completion, Score, float]]:
    """Completion, score and total of every row to which a reward applies, in the row order of a batch."""
    return [(completion, score, score.total) for completion, score in flat(groups) if score.total is not None]


def scores_of(groups: Sequence[ScoredGroup], device: torch.device) -> Tensor:
    """Total scores, [P, G]; NaN where no reward applies."""
    totals = [[math.nan if score.total is None else score.total for score in group.scores] for group in groups]
    return torch.tensor(totals, device=device)


def applies_of(groups: Sequence[ScoredGroup], device: torch.device) -> Tensor | None:
    """Where a reward applies, [P, G] bool; None where one applies to every completion."""
    applies = [[score.total is not None for score in group.scores] for group in groups]
    return None if all(map(all, applies)) else torch.tensor(applies, device=device)


def require_rewards(groups: Sequence[ScoredGroup], *, where: str, world: World, alone: bool = False) -> None:
    """Raise :class:`RewardError` unless a reward applies to some completion of the step, and is finite wherever one
    applies. ``alone``: each rank needs one of its own."""
    found = scored(groups)
    require_finite(torch.tensor([total for *_, total in found]), what="the reward", where=where)
    if world.any(not found) if alone else not world.any(bool(found)):
        raise RewardError(
            "no reward applies to any completion of the step: all gave None",
            hint="give a reward that applies to these prompts",
        )


def sampler_logprobs(groups: Sequence[ScoredGroup], batch: Batch) -> Tensor:
    """``sampler_logp`` of the batch's tokens, [B, T], 0 where the policy did not emit one."""
    emitted = [
        logp
        for completion, _ in flat(groups)
        for logp, own in zip(completion.sampler_logp, completion.mask, strict=True)
        if own
    ]
    out = torch.zeros(batch.mask.shape, device=batch.mask.device)
    return out.masked_scatter(batch.mask, torch.tensor(emitted, device=batch.mask.device))


@torch.no_grad()
def per_token(batch: Batch, figures: Callable[[Batch], tuple[Tensor, ...]], *, token_budget: int) -> tuple[Tensor, ...]:
    """``figures`` of every token, [B, T] each, 0 at padding; computed without gradient, one micro-batch at a time."""
    found: list[Tensor] = []
    for part in stoppable(micro_batches(batch, token_budget)):
        computed = figures(batch.rows(part))
        found = found or [torch.zeros(batch.mask.shape, device=batch.ids.device) for _ in computed]
        for out, values in zip(found, computed, strict=True):
            out[part, : values.size(1)] = values
    return tuple(found)


def policy_logprobs(model: PreTrainedModel, batch: Batch, *, temperature: float, token_budget: int) -> Tensor:
    """Log-probs [B, T] of the batch's completions under ``model``, without gradient."""
    (logp,) = per_token(batch, partial(completion_logprobs, model, temperature=temperature), token_budget=token_budget)
    return logp


def reference_logprobs(reference: Reference, batch: Batch, *, temperature: float, token_budget: int) -> Tensor:
    """``ref_logp`` of the batch's completions, [B, T], without gradient."""
    with reference.model() as model:
        return policy_logprobs(model, batch, temperature=temperature, token_budget=token_budget)


def sampled_of(
    groups: Sequence[ScoredGroup],
    policy: PreTrainedModel,
    reference: Reference,
    *,
    temperature: float,
    recompute: bool = False,
    mask_truncated: bool = False,
    token_budget: int,
) -> Sampled:
    """The groups' completions with their log-probs, without gradient. ``old_logp`` is the sampler's own unless
    ``recompute`` runs the policy; ``mask_truncated`` leaves completions cut at the length limit out of the loss."""
    batch = batch_of(groups, policy.device)
    sampler_logp = sampler_logprobs(groups, batch)
    old_logp = (
        policy_logprobs(policy, batch, temperature=temperature, token_budget=token_budget)
        if recompute
        else sampler_logp.clone()  # a checkpoint's file holds no memory twice
    )
    cut = [completion.finish_reason is FinishReason.LENGTH for completion, _ in flat(groups)]
    return Sampled(
        batch=batch,
        learned=~(torch.tensor(cut, device=policy.device) & mask_truncated),
        sampler_logp=sampler_logp,
        old_logp=old_logp,
        ref_logp=reference_logprobs(reference, batch, temperature=temperature, token_budget=token_budget),
    )


def generator_figures(generator: Generator) -> Figures:
    """What the generator says of its last call; over ranks, the mean."""
    return {name: Mean(value, 1.0) for name, value in generator.figures().items()}


def rollout_figures(groups: Sequence[ScoredGroup]) -> Figures:
    """Rewards, each part of them, and lengths. Names are TRL's.

    ``reward`` is the mean total, ``reward_std`` its spread over the step; ``rewards/NAME/mean`` and ``/std`` are those
    of one part, over the completions it applies to; ``logged/NAME`` is what rewards logged; ``frac_reward_none`` is the
    share to which none applies. Lengths count the tokens that the policy emitted; ``completions/clipped_ratio`` is the
    share cut at the length limit. ``num_tokens`` counts prompts too.
    """
    rows = flat(groups)
    count = len(rows)
    host = torch.device("cpu")
    flat_groups = zero_variance(scores_of(groups, host), applies_of(groups, host))
    lengths = torch.tensor([float(sum(completion.mask)) for completion, _ in rows])
    ended = torch.tensor([completion.finish_reason is not FinishReason.LENGTH for completion, _ in rows])
    tokens = sum(len(completion.ids) for completion, _ in rows) + sum(len(g.rollouts.prompt.ids) for g in groups)
    totals = [total for *_, total in scored(groups)]
    figures = moments("reward", "reward_std", totals) | {
        "frac_reward_none": Mean(1.0 - len(totals) / count, count),
        "frac_reward_zero_std": Mean(float(flat_groups.float().mean()), len(groups)),
        "completions/mean_length": Mean(float(lengths.mean()), count),
        "completions/max_length": Max(float(lengths.max())),
        "completions/min_length": Min(float(lengths.min())),
        "completions/clipped_ratio": Mean(1.0 - float(ended.float().mean()), count),
        "completions/mean_terminated_length": Mean(float(masked_mean(lengths, ended)), float(ended.sum())),
        "num_tokens": Sum(float(tokens)),
    }
    if any(completion.turns for completion, _ in rows):
        shown = sum(completion.mask.count(False) for completion, _ in rows)
        figures["episodes/turns"] = Mean(sum(len(completion.turns) for completion, _ in rows) / count, count)
        figures["episodes/shown_tokens"] = Mean(shown / count, count)
    for name in dict.fromkeys(name for _, score in rows for name in score.parts):
        values = [part for _, score in rows if (part := score.parts.get(name)) is not None]
        figures |= moments(f"rewards/{name}/mean", f"rewards/{name}/std", values)
    for name in dict.fromkeys(name for _, score in rows for name in score.logged):
        logged = [score.logged[name] for _, score in rows if name in score.logged]
        figures[f"logged/{name}"] = Mean(math.fsum(logged) / len(logged), len(logged))
    return figures


def moments(mean: str, std: str, values: Sequence[float]) -> Figures:
    """Mean and standard deviation of ``values`` under these names; nothing where there are none."""
    if not values:
        return {}
    column = torch.tensor(values)
    middle = float(column.mean())
    return {
        mean: Mean(middle, len(values)),
        std: Std(float(column.std(unbiased=False)), middle, len(values)),
    }


def kl_figures(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, where: str) -> Figures:
    """``kl``: KL(pi || pi_ref), the mean of sum_t d_t in nats per completion; ``kl_per_token``: the mean of d_t."""
    d = torch.where(mask, logp - ref_logp, torch.zeros_like(logp))
    require_finite(d, what="the log-ratio to the reference", where=where)
    return {
        "kl": Mean(float(d.sum(1).mean()), len(d)),
        "kl_per_token": Mean(float(masked_mean(d, mask)), float(mask.sum())),
    }
