"""The oracle: one completion at a time, the whole sequence through the model for every token, no cache, no batch.

It is slow and plain on purpose; :mod:`tether.generation.engine` must give the same completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.generation.sampling import draw, log_distribution, uniforms
from tether.generation.stopping import Ending, text_of
from tether.models.policy import policy_logits, replace_weights
from tether.types import Completion, Metrics, Prompt, Request, RolloutGroup, Sampling


class NaiveGenerator:
    """A :class:`tether.types.Generator` that shares the model it is given."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.version = model, tokenizer, 0

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        return [
            RolloutGroup(
                prompt=request.prompt,
                completions=tuple(
                    self.complete(request.prompt, sampling, uniforms(seed, sampling.max_new_tokens))
                    for seed in request.seeds
                ),
            )
            for request in requests
        ]

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        replace_weights(self.model, weights)
        self.version = version

    def figures(self) -> Metrics:
        return {}

    @torch.no_grad()
    def complete(self, prompt: Prompt, sampling: Sampling, u: Tensor) -> Completion:
        """The completion of ``prompt`` that the uniform numbers ``u``, one per token, decide."""
        ending = Ending.of(self.model, self.tokenizer, sampling)
        ids: list[int] = []
        sampler_logp: list[float] = []
        finish_reason = None
        while finish_reason is None:
            sequence = torch.tensor([[*prompt.ids, *ids]], device=self.model.device)
            logits = policy_logits(self.model, sequence)[:, -1]
            step, end_ids = (torch.tensor(x, device=logits.device) for x in ([len(ids)], ending.eos))
            logp = log_distribution(logits, sampling, step=step, ends=end_ids.long())
            token = draw(logp, u[len(ids) : len(ids) + 1].to(logp.device), greedy=sampling.temperature == 0)
            ids.append(int(token))
            sampler_logp.append(float(logp[0, token]))
            finish_reason = ending.reason(ids, after=prompt.ids)
        return Completion(
            ids=tuple(ids),
            mask=(True,) * len(ids),
            sampler_logp=tuple(sampler_logp),
            finish_reason=finish_reason,
            text=text_of(self.tokenizer, ids, after=prompt.ids),
            weights_version=self.version,
        )
