"""Sampling from a model whose rows cannot be packed: a prompt's completions in lockstep, with the library's own cache
or, where that changes what the model computes, without one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.generation.sampling import diverged, draw, log_distribution, uniforms
from tether.generation.stopping import Ending, text_of
from tether.generation.tally import Tally
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


@dataclass
class Row:
    """A completion that is being sampled."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    routes: list[int] = field(default_factory=list)
    """Of each token, if the model has experts."""
    reason: FinishReason | None = None
    """Why it ended."""


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
    ending, recorded = Ending.of(model, tokenizer, sampling), Routes(model)
    ends = torch.tensor(ending.eos, device=device).long()
    u = torch.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds]).to(device)
    ids = torch.tensor([list(prompt.ids)] * len(seeds), device=device)
    rows = [Row() for _ in seeds]
    past: Any = None
    began = prefilled = time.perf_counter()
    for t in stoppable(range(sampling.max_new_tokens)):
        hidden, routes, past = last_states(model, ids, past, recorded, cached=cached)
        if t == 0:
            prefilled = time.perf_counter()
            tally.prefill_seconds += prefilled - began
            tally.prompt_tokens += len(prompt.ids)
        step = torch.full((len(seeds),), t, device=device)
        logp = log_distribution(logits_of(hidden), sampling, step=step, ends=ends)
        if not torch.isfinite(logp.amax(-1)).all():
            raise diverged()
        tokens = draw(logp, u[:, t], greedy=sampling.temperature == 0)
        chosen = logp.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
        ids = torch.cat([ids, tokens.unsqueeze(1)], 1)
        for row, token, value, route in zip(rows, tokens.tolist(), chosen, routes, strict=True):
            if row.reason is None:
                row.ids.append(token)
                row.logps.append(value)
                row.routes += route
                row.reason = ending.reason(row.ids, after=prompt.ids)
                tally.row_steps += 1
        tally.slot_steps += len(seeds)
        if all(row.reason for row in rows):
            break
    tally.decode_seconds += time.perf_counter() - prefilled
    tally.new_tokens += sum(len(row.ids) for row in rows)
    return [
        Completion(
            ids=tuple(row.ids),
            mask=(True,) * len(row.ids),
            sampler_logp=tuple(row.logps),
            finish_reason=row.reason or FinishReason.LENGTH,
            text=text_of(tokenizer, row.ids, after=prompt.ids),
            weights_version=version,
            routes=tuple(row.routes) if recorded.routers else None,
        )
        for row in rows
    ]


def last_states(
    model: PreTrainedModel, ids: Tensor, past: Any, recorded: Routes, *, cached: bool
) -> tuple[Tensor, list[list[int]], Any]:
    """The hidden state at the last position of each row, [B, D], its route, if the model has experts, and the cache
    after it."""
    new = ids if past is None else ids[:, -1:]
    given = {"past_key_values": past} if past is not None else {}
    with recorded.recording():
        out = model.base_model(input_ids=new, use_cache=cached, **given)
    found = getattr(out, "past_key_values", None) if cached else None
    if cached and found is None:
        raise ValueError("the model gives no cache of keys and values")
    routes = recorded.take()
    last: list[list[int]] = [[]] * len(ids) if routes is None else routes.view(len(ids), -1)[:, -1:].tolist()
    return out.last_hidden_state[:, -1], last, found
