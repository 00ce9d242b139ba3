"""From scored groups to the tensors that PPO and GRPO share, and to the metrics of what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.algorithms.optimise import require_finite
from tether.data.batching import micro_batches
from tether.interruption import stoppable
from tether.models.flops import Lengths
from tether.models.policy import completion_logprobs
from tether.ops.advantages import zero_variance
from tether.ops.masked import masked_mean
from tether.types import Batch, Completion, Finish, Metrics, Sampling, Score, ScoredGroup


def flat(groups: Sequence[ScoredGroup]) -> list[tuple[Completion, Score]]:
    """Completion and score of every row, prompt by prompt: the order of a batch's rows."""
    return [pair for group in groups for pair in zip(group.rollouts.completions, group.scores, strict=True)]


def batch_of(groups: Sequence[ScoredGroup], device: torch.device) -> Batch:
    """The groups' prompts and completions, [P * G] rows."""
    rows = [(g.rollouts.prompt.ids, c.ids) for g in groups for c in g.rollouts.completions]
    return Batch.collate(rows, device)


def lengths_of(groups: Sequence[ScoredGroup]) -> Lengths:
    """Tokens of each group's prompt and of its completions."""
    return [(len(g.rollouts.prompt.ids), [len(c.ids) for c in g.rollouts.completions]) for g in groups]


def scores_of(groups: Sequence[ScoredGroup], device: torch.device) -> Tensor:
    """Total scores, [P, G]."""
    return torch.tensor([[score.total for score in group.scores] for group in groups], device=device)


def sampler_logprobs(groups: Sequence[ScoredGroup], mask: Tensor) -> Tensor:
    """What the sampler said of each token it drew, [B, T], 0 at padding."""
    flat_logprobs = [logp for completion, _ in flat(groups) for logp in completion.logprobs]
    out = torch.zeros(mask.shape, device=mask.device)
    return out.masked_scatter(mask, torch.tensor(flat_logprobs, device=mask.device))


@torch.no_grad()
def per_token(batch: Batch, figure: Callable[[Batch], Tensor], *, token_budget: int) -> Tensor:
    """``figure`` of every token, [B, T], 0 at padding, computed without gradient one micro-batch at a time."""
    out = torch.zeros(batch.mask.shape, device=batch.ids.device)
    for part in stoppable(micro_batches(batch, token_budget)):
        values = figure(batch.rows(part))
        out[part, : values.size(1)] = values
    return out


def policy_logprobs(model: PreTrainedModel, batch: Batch, *, temperature: float, token_budget: int) -> Tensor:
    """Log-probs [B, T] of the batch's completions under ``model``, without gradient."""
    return per_token(
        batch, lambda part: completion_logprobs(model, part, temperature=temperature)[0], token_budget=token_budget
    )


def old_logprobs(
    policy: PreTrainedModel, groups: Sequence[ScoredGroup], batch: Batch, *, sampling: Sampling, token_budget: int
) -> Tensor:
    """log pi_old of each token, [B, T].

    The sampler's own log-probs, unless it drew from a truncated distribution: the policy's are then computed afresh.
    """
    if sampling.truncated:
        return policy_logprobs(policy, batch, temperature=sampling.temperature, token_budget=token_budget)
    return sampler_logprobs(groups, batch.mask)


class TokenFigures:
    """Named figures of every token of a minibatch, gathered from its micro-batches for the metrics."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.figures: dict[str, Tensor] = {}

    def put(self, rows: Tensor, **figures: Tensor) -> None:
        for name, values in figures.items():
            whole = self.figures.setdefault(name, torch.zeros(self.mask.shape, device=self.mask.device))
            whole[rows, : values.size(1)] = values.detach().float()

    def __getitem__(self, name: str) -> Tensor:
        return self.figures[name]

    def mean(self, name: str) -> float:
        return float(masked_mean(self.figures[name], self.mask))


def rollout_metrics(groups: Sequence[ScoredGroup]) -> Metrics:
    """Rewards, each part of them, and lengths. Names are TRL's.

    ``reward`` is the mean total, ``reward_std`` its spread over the step; ``rewards/NAME/mean`` and ``/std`` are a
    part's, over the completions it applies to; ``completions/clipped_ratio`` is the share cut at the length limit.
    """
    rows = flat(groups)
    scores = scores_of(groups, torch.device("cpu"))
    lengths = torch.tensor([float(len(completion.ids)) for completion, _ in rows])
    ended = torch.tensor([completion.finish is not Finish.LENGTH for completion, _ in rows])
    metrics = {
        "reward": float(scores.mean()),
        "reward_std": float(scores.std(unbiased=False)),
        "frac_reward_zero_std": float(zero_variance(scores).float().mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/min_length": float(lengths.min()),
        "completions/clipped_ratio": 1.0 - float(ended.float().mean()),
        "completions/mean_terminated_length": float(masked_mean(lengths, ended)),
        "num_tokens": float(lengths.sum()) + sum(len(group.rollouts.prompt.ids) for group in groups),
    }
    for name in rows[0][1].parts:
        values = [part for _, score in rows if (part := score.parts[name]) is not None]
        if values:
            column = torch.tensor(values)
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = float(column.std(unbiased=False))
    return metrics


def kl_metrics(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, where: str) -> Metrics:
    """``kl``: KL(pi || pi_ref), the mean of sum_t d_t in nats a completion; ``kl_per_token``: the mean of d_t."""
    d = torch.where(mask, logp - ref_logp, torch.zeros_like(logp))
    require_finite(d, what="the log-ratio to the reference", where=where)
    return {"kl": float(d.sum(1).mean()), "kl_per_token": float(masked_mean(d, mask))}


def logprob_gap(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Metrics:
    """How far the training pass is from the sampler on the same tokens and weights, in nats."""
    gap = torch.where(mask, (logp - old_logp).abs(), torch.zeros_like(logp))
    return {"sampling/logprob_gap_mean": float(masked_mean(gap, mask)), "sampling/logprob_gap_max": float(gap.max())}
