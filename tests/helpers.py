"""Small pieces that several tests build runs from."""

from __future__ import annotations

import torch

from tether.algorithms.experience import Sampled
from tether.algorithms.pending import Rollouts
from tether.algorithms.phases import PhaseClock
from tether.types import Completion, FinishReason, Prompt, RolloutGroup, Score, ScoredGroup


def completion(ids, *, mask=None, logprobs=None, finish=None, text="") -> Completion:
    """A completion of which the policy emitted every token, unless ``mask`` says otherwise."""
    mask = tuple(mask) if mask is not None else (True,) * len(ids)
    return Completion(
        ids=tuple(ids),
        mask=mask,
        sampler_logp=tuple(logprobs) if logprobs is not None else tuple(-1.0 if emitted else 0.0 for emitted in mask),
        finish_reason=finish or (FinishReason.EOS if ids[-1] == 1 else FinishReason.LENGTH),
        text=text,
        weights_version=0,
    )


def group(prompt_ids, rows, *, masks=None, text="p", columns=None) -> RolloutGroup:
    """A rollout group from lists of token ids."""
    masks = masks or [None] * len(rows)
    return RolloutGroup(
        prompt=Prompt(ids=tuple(prompt_ids), text=text, columns=columns or {}),
        completions=tuple(completion(ids, mask=mask) for ids, mask in zip(rows, masks, strict=True)),
    )


def scored(rollouts, totals, *, token_rewards=None) -> ScoredGroup:
    """Scores by hand."""
    return ScoredGroup(
        rollouts=rollouts,
        scores=tuple(
            Score(total=total, token_rewards=token_rewards[i] if token_rewards else None)
            for i, total in enumerate(totals)
        ),
    )


def rollouts(groups) -> Rollouts:
    """Scored groups as what a step rolled out."""
    return Rollouts(groups=tuple(groups), figures={}, clock=PhaseClock(torch.device("cpu")))


def sampled(batch, old_logp, ref_logp=None, *, sampler_logp=None, learned=None) -> Sampled:
    """A batch with its log-probs; those that are not given are ``old_logp`` too."""
    return Sampled(
        batch=batch,
        learned=torch.ones(len(batch), dtype=torch.bool) if learned is None else learned,
        sampler_logp=old_logp if sampler_logp is None else sampler_logp,
        old_logp=old_logp,
        ref_logp=old_logp if ref_logp is None else ref_logp,
    )


class FunctionScorer:
    """A Scorer from a function of (prompt, completion)."""

    def __init__(self, function) -> None:
        self.function = function

    def score(self, groups):
        return [
            ScoredGroup(rollouts=g, scores=tuple(Score(total=float(self.function(g.prompt, c))) for c in g.completions))
            for g in groups
        ]


def random_groups(prompts: int, group_size: int, *, vocab: int = 250, longest: int = 9, seed: int = 0):
    """Scored groups of mixed lengths, with random ids, scores and log-probs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def ids(n):
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    return [
        scored(
            group([0, *ids(draw(1, 6))], [ids(draw(1, longest)) for _ in range(group_size)]),
            torch.randn(group_size, generator=generator).tolist(),
        )
        for _ in range(prompts)
    ]


def rows_of(sequences, *, prompt: int = 1):
    """Token sequences as (prompt ids, completion ids), cut after ``prompt`` tokens."""
    return [(tuple(ids[:prompt]), tuple(ids[prompt:])) for ids in sequences]


def gradient(module) -> torch.Tensor:
    """All gradients of a module in one vector."""
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


class Frozen(torch.optim.SGD):
    """Leaves weights and gradients as they are, so that a step's gradient can be read."""

    def __init__(self, module):
        super().__init__(module.parameters(), lr=0.0)
        for group in self.param_groups:
            group["peak_lr"] = 0.0

    def zero_grad(self, set_to_none=True):
        pass


def step_gradient(module, run):
    module.zero_grad()
    run(Frozen(module))
    return gradient(module).clone()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
