"""The oracle: one completion at a time, the whole sequence through the model for every token, no cache, no batch.

It is slow and plain on purpose; :mod:`tether.generation.engine` must give the same completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.generation.episodes import Calls, Episode, Episodes
from tether.generation.sampling import draw, log_distribution, uniforms
from tether.generation.stopping import Ending, text_of
from tether.models.policy import policy_logits, replace_weights
from tether.types import Completion, Metrics, Prompt, Request, RolloutGroup, Sampling


class NaiveGenerator:
    """A :class:`tether.types.Generator` that shares the model it is given."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, episodes: Episodes | None = None
    ) -> None:
        self.model, self.tokenizer, self.version, self.episodes = model, tokenizer, 0, episodes

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        if self.episodes is not None:
            return self.play(requests, sampling, self.episodes)
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

    def play(self, requests: Sequence[Request], sampling: Sampling, episodes: Episodes) -> list[RolloutGroup]:
        """The episodes of ``requests``, one after the other."""
        begun = episodes.begin(requests, self.tokenizer, Ending.of(self.model, self.tokenizer, sampling))
        with Calls(episodes) as calls:
            return [
                RolloutGroup(
                    prompt=own[0].prompt,
                    completions=tuple(
                        self.episode(one, sampling, uniforms(seed, sampling.max_new_tokens), calls)
                        for one, seed in zip(own, request.seeds, strict=True)
                    ),
                )
                for request, own in zip(requests, begun, strict=True)
            ]

    def episode(self, episode: Episode, sampling: Sampling, u: Tensor, calls: Calls) -> Completion:
        """The completion that ``u``, one number per token of either side, and the environment decide."""
        logps: list[float] = []
        while episode.finish is None:
            token, logp = self.next(episode.prompt, episode.ids, sampling, u, episode.ending)
            over = episode.emitted(token)
            logps.append(logp)
            if over:
                answer = calls.ask(episode.environment.step, episode.action)
                calls.wait([answer])
                logps += [0.0] * len(episode.answered(answer.result()))
        return Completion(
            ids=tuple(episode.ids),
            mask=tuple(episode.mask),
            sampler_logp=tuple(logps),
            finish_reason=episode.finish,
            text=text_of(self.tokenizer, episode.ids, after=episode.prompt.ids),
            weights_version=self.version,
            turns=tuple(episode.turns),
            messages=tuple(episode.messages) or None,
        )

    @torch.no_grad()
    def next(
        self, prompt: Prompt, ids: Sequence[int], sampling: Sampling, u: Tensor, ending: Ending
    ) -> tuple[int, float]:
        """The token after ``prompt`` and ``ids``, and its log-prob."""
        sequence = torch.tensor([[*prompt.ids, *ids]], device=self.model.device)
        logits = policy_logits(self.model, sequence)[:, -1]
        step, end_ids = (torch.tensor(x, device=logits.device) for x in ([len(ids)], ending.eos))
        logp = log_distribution(logits, sampling, step=step, ends=end_ids.long())
        token = draw(logp, u[len(ids) : len(ids) + 1].to(logp.device), greedy=sampling.temperature == 0)
        return int(token), float(logp[0, token])

    def complete(self, prompt: Prompt, sampling: Sampling, u: Tensor) -> Completion:
        """The completion of ``prompt`` that the uniform numbers ``u``, one per token, decide."""
        ending = Ending.of(self.model, self.tokenizer, sampling)
        ids: list[int] = []
        sampler_logp: list[float] = []
        finish_reason = None
        while finish_reason is None:
            token, logp = self.next(prompt, ids, sampling, u, ending)
            ids.append(token)
            sampler_logp.append(logp)
            finish_reason = ending.reason(ids, after=prompt.ids)
        return Completion(
            ids=tuple(ids),
            mask=(True,) * len(ids),
            sampler_logp=tuple(sampler_logp),
            finish_reason=finish_reason,
            text=text_of(self.tokenizer, ids, after=prompt.ids),
            weights_version=self.version,
        )
