"""The rollout engine of this process: each prompt through the model once, then all its completions together.

Prompts are padded on the left and prefilled in one pass; the cache rows are then repeated for the G completions, and
rows leave the batch, cache and all, at the token that finishes them. Prompts of like length travel together, in waves
of at most ``max_rows`` completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import GuardError
from tether.generation.cache import BufferedCache
from tether.generation.sampling import draw, log_distribution, uniforms
from tether.generation.stopping import finish_of, text_of
from tether.models.loading import eos_ids
from tether.models.policy import replace_weights
from tether.types import Completion, Finish, Prompt, RolloutGroup, Sampling


class Engine:
    """A :class:`tether.types.Generator` that samples from the very module that is being trained: no weights are copied
    as long as :meth:`load_weights` is given that module's own tensors."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_rows: int = 512) -> None:
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.version = 0

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into the model where they are not its own already; the next rollout carries ``version``."""
        replace_weights(self.model, weights)
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        """``group_size`` completions of each prompt; completion j of prompt i is decided by (seed, i, j)."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        per_wave = max(1, self.max_rows // group_size)
        groups: dict[int, RolloutGroup] = {}
        for start in range(0, len(by_length), per_wave):
            wave = by_length[start : start + per_wave]
            u = torch.stack(
                [uniforms(seed, i, j, sampling.max_new_tokens) for i in wave for j in range(group_size)]
            ).to(self.model.device)
            completions = self._complete([prompts[i].ids for i in wave], group_size, sampling, u)
            for k, i in enumerate(wave):
                members = tuple(completions[k * group_size : (k + 1) * group_size])
                groups[i] = RolloutGroup(prompt=prompts[i], completions=members, weights_version=self.version)
        return [groups[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _complete(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, u: Tensor
    ) -> list[Completion]:
        """The completions of a wave, prompt by prompt; ``u`` [len(prompts) * G, max_new_tokens]."""
        device = self.model.device
        ends = eos_ids(self.model, self.tokenizer)
        end_ids = torch.tensor(ends, dtype=torch.int64, device=device)
        cache = BufferedCache(self.model, max(map(len, prompts)) + sampling.max_new_tokens)
        logits, mask = self._prefill(prompts, cache)
        every = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        cache.select_rows(every)
        logits, mask = logits[every], mask[every]

        tokens = torch.zeros(u.shape, dtype=torch.int64, device=device)
        logprobs = torch.zeros(u.shape, dtype=torch.float32, device=device)
        lengths = torch.zeros(len(u), dtype=torch.int64, device=device)
        alive = torch.arange(len(u), device=device)
        for t in range(sampling.max_new_tokens):
            logp = log_distribution(logits, sampling, step=t, eos_ids=ends)
            if not torch.isfinite(logp.amax(-1)).all():
                raise GuardError(
                    f"generation: the logits of token {t} are not finite; the policy's weights have diverged"
                )
            token = draw(logp, u[alive, t], greedy=sampling.temperature == 0)
            tokens[alive, t] = token
            logprobs[alive, t] = logp.gather(1, token.unsqueeze(1)).squeeze(1)
            lengths[alive] = t + 1
            done = torch.isin(token, end_ids)
            if sampling.stop:
                done |= self._stopped(tokens[alive, : t + 1], sampling, ends)
            if done.any():
                going = (~done).nonzero().squeeze(1)
                alive, token, mask = alive[going], token[going], mask[going]
                cache.select_rows(going)
            if len(alive) == 0 or t + 1 == sampling.max_new_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
            logits = self._forward(token.unsqueeze(1), mask, cache)
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        rows = zip(owners, tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
        return [self._completion(prompt, row[:n], logp[:n], sampling, ends) for prompt, row, logp, n in rows]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: BufferedCache) -> tuple[Tensor, Tensor]:
        """Logits after each prompt [P, V] and the mask of real positions [P, L], padding on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        mask = torch.arange(width, device=ids.device) >= (width - lengths).unsqueeze(1)
        return self._forward(ids, mask.long(), cache), mask.long()

    def _forward(self, ids: Tensor, mask: Tensor, cache: BufferedCache) -> Tensor:
        """Logits of the last position [b, V]; ``mask`` [b, S] covers cache and ``ids``, positions count real tokens."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _stopped(self, emitted: Tensor, sampling: Sampling, ends: tuple[int, ...]) -> Tensor:
        found = [finish_of(ids, sampling, ends, self.tokenizer) is Finish.STOP for ids in emitted.tolist()]
        return torch.tensor(found, device=emitted.device)

    def _completion(
        self,
        prompt: Sequence[int],
        ids: list[int],
        logprobs: list[float],
        sampling: Sampling,
        ends: tuple[int, ...],
    ) -> Completion:
        finish = finish_of(ids, sampling, ends, self.tokenizer)
        assert finish is not None
        text = text_of(self.tokenizer, ids, after=prompt)
        return Completion(ids=tuple(ids), logprobs=tuple(logprobs), finish=finish, text=text)
