"""The oracle: one completion at a time, the whole sequence through the model for every token, no cache, no batch.

Slow and plain on purpose; :mod:`tether.generation.engine` must give the same completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.generation.sampling import draw, log_distribution, uniforms
from tether.generation.stopping import finish_of, text_of
from tether.models.loading import eos_ids
from tether.models.policy import policy_logits, replace_weights
from tether.types import Completion, Metrics, Prompt, RolloutGroup, Sampling


class NaiveGenerator:
    """A :class:`tether.types.Generator` that shares the model it is given."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.version = model, tokenizer, 0

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        return [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(
                    self.complete(prompt, sampling, uniforms(seed, i, j, sampling.max_new_tokens))
                    for j in range(group_size)
                ),
                weights_version=self.version,
            )
            for i, prompt in enumerate(prompts)
        ]

    def figures(self) -> Metrics:
        return {}

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        replace_weights(self.model, weights)
        self.version = version

    @torch.no_grad()
    def complete(self, prompt: Prompt, sampling: Sampling, u: Tensor) -> Completion:
        ends = eos_ids(self.model, self.tokenizer)
        ids: list[int] = []
        logprobs: list[float] = []
        while True:
            sequence = torch.tensor([[*prompt.ids, *ids]], device=self.model.device)
            logits = policy_logits(self.model, sequence)[:, -1]
            step, end_ids = (torch.tensor(x, device=logits.device) for x in ([len(ids)], ends))
            logp = log_distribution(logits, sampling, step=step, ends=end_ids.long())
            token = draw(logp, u[len(ids) : len(ids) + 1].to(logp.device), greedy=sampling.temperature == 0)
            ids.append(int(token))
            logprobs.append(float(logp[0, token]))
            finish = finish_of(ids, sampling, ends, self.tokenizer)
            if finish:
                text = text_of(self.tokenizer, ids, after=prompt.ids)
                return Completion(ids=tuple(ids), logprobs=tuple(logprobs), finish=finish, text=text)
