"""Sampling from a model whose rows cannot be packed: a prompt's completions in lockstep, with the library's own cache
or, where that changes what the model computes, without one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.generation.sampling import diverged, draw, log_distribution, uniforms
from tether.generation.scheduler import Tally
from tether.generation.stopping import Ending, text_of
from tether.models.policy import project
from tether.models.routes import Routes
from tether.stop_requests import stoppable
from tether.types import Completion, FinishReason, Request, Sampling


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    sampling: Sampling,
    *,
    version: int,
    cached: bool,
    max_rows: int,
    tally: Tally,
) -> list[Completion]:
    """The completions of a request, at most ``max_rows`` at a time."""
    found: list[Completion] = []
    for first in range(0, len(request.seeds), max_rows):
        seeds = request.seeds[first : first + max_rows]
        found += lockstep(model, tokenizer, request, seeds, sampling, version=version, cached=cached, tally=tally)
    return found


@torch.no_grad()
def lockstep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    version: int,
    cached: bool,
    tally: Tally,
) -> list[Completion]:
    """One completion per seed, all of the same length at any time, so that nothing is padded."""
    prompt, device, logits_of = request.prompt, model.device, project(model)
    ending = Ending.of(model, tokenizer, sampling)
    ends = torch.tensor(ending.eos, device=device).long()
    u = torch.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds]).to(device)
    ids = torch.tensor([list(prompt.ids)] * len(seeds), device=device)
    drawn: list[list[int]] = [[] for _ in seeds]
    logps: list[list[float]] = [[] for _ in seeds]
    routed: list[list[int]] = [[] for _ in seeds]
    recorded = Routes(model)
    reasons: list[FinishReason | None] = [None for _ in seeds]
    past: Any = None
    began = prefilled = time.perf_counter()
    for t in stoppable(range(sampling.max_new_tokens)):
        with recorded.recording():
            hidden, past = last_states(model, ids, past, cached=cached)
        routes = recorded.take()
        found = None if routes is None else routes.view(len(seeds), -1)[:, -1].tolist()
        if t == 0:
            prefilled = time.perf_counter()
            tally.prefill_seconds += prefilled - began
            tally.prompt_tokens += len(prompt.ids)
        logp = log_distribution(
            logits_of(hidden), sampling, step=torch.full((len(seeds),), t, device=device), ends=ends
        )
        if not torch.isfinite(logp.amax(-1)).all():
            raise diverged()
        tokens = draw(logp, u[:, t], greedy=sampling.temperature == 0)
        chosen = logp.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
        ids = torch.cat([ids, tokens.unsqueeze(1)], 1)
        for row, (token, value) in enumerate(zip(tokens.tolist(), chosen, strict=True)):
            if reasons[row] is None:
                drawn[row].append(token)
                logps[row].append(value)
                routed[row] += found[row : row + 1] if found is not None else []
                reasons[row] = ending.reason(drawn[row], after=prompt.ids)
                tally.row_steps += 1
        tally.slot_steps += len(seeds)
        if None not in reasons:
            break
    tally.decode_seconds += time.perf_counter() - prefilled
    tally.new_tokens += sum(map(len, drawn))
    return [
        Completion(
            ids=tuple(own),
            mask=(True,) * len(own),
            sampler_logp=tuple(logp),
            finish_reason=reason or FinishReason.LENGTH,
            text=text_of(tokenizer, own, after=prompt.ids),
            weights_version=version,
            routes=tuple(route) if recorded.routers else None,
        )
        for own, logp, reason, route in zip(drawn, logps, reasons, routed, strict=True)
    ]


def last_states(model: PreTrainedModel, ids: Tensor, past: Any, *, cached: bool) -> tuple[Tensor, Any]:
    """The hidden state at the last position of each row, [B, D], and the cache after it."""
    new = ids if past is None else ids[:, -1:]
    out = model.base_model(input_ids=new, use_cache=cached, **({"past_key_values": past} if past is not None else {}))
    found = getattr(out, "past_key_values", None) if cached else None
    if cached and found is None:
        raise ValueError("the model gives no cache of keys and values")
    return out.last_hidden_state[:, -1], found
