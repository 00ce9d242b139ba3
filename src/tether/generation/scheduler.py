"""A rollout of the engine: requests from their first token to their last, by continuous batching.

Completions in flight are rows of one batch. A row that ends leaves at once and a waiting completion takes its place.
An episode whose environment has not answered keeps its keys and steps aside; what the environment shows is then the
only thing that is run before it goes on.
On CUDA a decoding step is one graph per shape, with no Python between its layers (:mod:`tether.generation.graphs`);
the host looks at the tokens every :data:`tether.generation.graphs.STRIDE` steps and drops those behind an end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.batching import within_budget
from tether.generation.cache import DecodeLayout, Pool, PrefillLayout, Seating, Shape, aligned, extent
from tether.generation.episodes import PATIENCE, Calls, Episode
from tether.generation.graphs import STRIDE, GraphedStep, graph_shape, graphed
from tether.generation.rows import DeviceRows, InFlight, arranged, close, completion_of, gaps, in_flight, shown_tokens
from tether.generation.sampling import diverged, draw, log_distribution, uniforms
from tether.generation.stopping import Ending, text_of
from tether.generation.tally import Room, Tally
from tether.models.attention import laid_out
from tether.models.policy import project
from tether.models.routes import Routes
from tether.stop_requests import check
from tether.types import Completion, Request, Sampling

PREFILL_TOKENS = 8192
"""Prompt tokens of one forward pass; a longer prompt has a pass of its own."""


class Rollout:
    """Admits completions, decodes, retires those that have ended, until all requests are answered.

    Rows and slots are dense: rows [0, n) of the own pool are ``rows``, the next ones ``aside``, slots [0, s) of the
    prefix pool are ``slots``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        room: Room,
        version: int,
        tally: Tally,
        episodes: Sequence[Sequence[Episode]] = (),
        calls: Calls | None = None,
        finished: Callable[[int, list[Completion]], None],
    ) -> None:
        """``episodes`` are those of each request, where there are any, and ``calls`` what asks their environments.
        ``finished`` takes the number of a request and its completions, once all of them have ended."""
        self.calls, self.finished = calls, finished
        self.model, self.tokenizer, self.version, self.tally = model, tokenizer, version, tally
        self.prompts, self.sampling = [request.prompt.ids for request in requests], sampling
        self.device = model.device
        self.graphed = graphed(model, self.device)
        self.trunk, self.project = model.base_model, project(model)
        self.embed = model.get_input_embeddings()
        self.recorded = Routes(self.trunk)
        self.ending = Ending.of(model, tokenizer, sampling)
        self.end_ids = torch.tensor(self.ending.eos, dtype=torch.int64, device=self.device)

        self.waiting = deque(in_flight([request.seeds for request in requests], episodes))
        self.capacity = room.rows
        self.prefixes = Pool(model, room.slots, room.slot_tokens)
        self.own = Pool(model, room.rows, room.row_tokens)
        self.tally.cache_bytes = max(self.tally.cache_bytes, self.prefixes.data.nbytes + self.own.data.nbytes)

        self.rows: list[InFlight] = []
        self.aside: list[InFlight] = []
        """Episodes whose environment has not answered yet."""
        self.slots: list[int] = []
        """The request whose prompt each slot holds."""
        self.slot_states: list[Tensor] = []
        """The hidden state at the end of each slot's prompt: the first tokens are drawn from it."""
        self.slot_routes: list[Tensor] = []
        """The routes of these states, if the model has experts."""
        self.seating: Seating | None = None
        """Of the present rows and slots, once it is needed."""
        # one job and one token more than there are, for what is sampled in empty rows and past a completion's end
        self.spare = len(self.waiting)
        self.device_rows = DeviceRows.empty(aligned(self.capacity), job=self.spare, device=self.device)
        shape = (self.spare + 1, sampling.max_new_tokens + 1)
        self.u = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.routes = torch.zeros(shape, dtype=torch.int64, device=self.device) if self.recorded.routers else None
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.step: Callable[[Seating], None] = GraphedStep(self.decode_step) if self.graphed else self.decode_step
        self.over: list[list[InFlight]] = [[] for _ in requests]
        """Those of each request that have ended."""
        self.sizes = [len(request.seeds) for request in requests]

    def run(self) -> None:
        """Answer all requests."""
        started, prefill = time.monotonic(), self.tally.prefill_seconds
        with self.recorded.recording():
            while self.waiting or self.rows or self.aside:
                check()
                if self.may_admit():
                    self.admit()
                elif self.rows:
                    self.decode()
                self.retire()
        self.tally.decode_seconds += time.monotonic() - started - (self.tally.prefill_seconds - prefill)

    def may_admit(self) -> bool:
        """Whether a completion waits and there is room: an eighth of all rows at least, so that prompts are prefilled
        together."""
        if not self.waiting:
            return False
        room = self.capacity - len(self.rows) - len(self.aside)
        slotted = self.waiting[0].request in self.slots or len(self.slots) < self.prefixes.places
        return slotted and room >= max(1, min(len(self.waiting), self.capacity // 8))

    def admit(self) -> None:
        """Give rows to waiting completions, prefill the prompts that are new, and draw the first tokens."""
        started = time.monotonic()
        newcomers: list[InFlight] = []
        fresh: list[int] = []
        while self.waiting and len(self.rows) + len(self.aside) + len(newcomers) < self.capacity:
            request = self.waiting[0].request
            if request not in self.slots and request not in fresh:
                if len(self.slots) + len(fresh) == self.prefixes.places:
                    break
                fresh.append(request)
            newcomers.append(self.waiting.popleft())
        for part in within_budget([0] * len(fresh), [len(self.prompts[i]) for i in fresh], fresh, PREFILL_TOKENS):
            self.prefill([fresh[k] for k in part.tolist()])
        if self.graphed:
            torch.cuda.synchronize(self.device)
        self.tally.prefill_seconds += time.monotonic() - started

        start, stop = len(self.rows), len(self.rows) + len(newcomers)
        self.arrange([*self.rows, *newcomers], self.aside)
        jobs = [row.job for row in newcomers]
        self.device_rows.put(range(start, stop), newcomers, [len(self.prompts[row.request]) for row in newcomers])
        drawn = [uniforms(row.seed, self.sampling.max_new_tokens) for row in newcomers]
        self.u[jobs, :-1] = torch.stack(drawn).to(self.device)
        slot_of = {request: slot for slot, request in enumerate(self.slots)}
        states = torch.stack([self.slot_states[slot_of[row.request]] for row in newcomers])
        padded = torch.cat([states, states.new_zeros(aligned(len(states)) - len(states), states.size(1))])
        routes = (
            torch.stack([self.slot_routes[slot_of[row.request]] for row in newcomers]) if self.slot_routes else None
        )
        self.emit(start, stop, self.project(padded)[: len(states)], routes)
        for row in newcomers:
            row.sampled = 1

    def prefill(self, requests: Sequence[int]) -> None:
        """Run prompts through the model, packed one behind the other, into the next slots."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for slot, request in enumerate(requests, len(self.slots)):
            tokens = self.prompts[request]
            spans.append((slot, len(ids), len(tokens)))
            ids += tokens
            positions += range(len(tokens))
        self.tally.prompt_tokens += len(ids)
        filling = [0] * (aligned(len(ids)) - len(ids))
        with laid_out(self.trunk):
            hidden = self.trunk(
                input_ids=torch.tensor([ids + filling], device=self.device),
                position_ids=torch.tensor([positions + filling], device=self.device),
                use_cache=False,
                layout=PrefillLayout(self.prefixes, spans),
            ).last_hidden_state[0]
        self.slots += requests
        ends = [start + length - 1 for _, start, length in spans]
        self.slot_states += [hidden[end].clone() for end in ends]
        if (routes := self.recorded.take()) is not None:
            self.slot_routes += [routes[end].clone() for end in ends]

    def decode(self) -> None:
        """One step on a CPU; :data:`STRIDE` steps on CUDA, unless a stop string has to be looked for."""
        steps = STRIDE if self.graphed and not self.sampling.stop else 1
        reach = min(max(row.sampled for row in self.rows) + steps - 1, self.sampling.max_new_tokens)
        if self.seating is None or reach > self.seating.shape.own_reach:
            self.seating = self.seat(self.rows, reach)
        for _ in range(steps):
            self.step(self.seating)
        for row in self.rows:
            row.sampled += steps
        self.tally.row_steps += steps * len(self.rows)
        self.tally.slot_steps += steps * self.capacity

    def decode_step(self, seating: Seating) -> None:
        """Run the last token of the rows of ``seating`` and sample the next. Nothing in it waits for the device."""
        rows = seating.shape.rows
        padded = aligned(rows)
        count = self.device_rows.count[:padded].clamp(max=self.sampling.max_new_tokens)
        positions = self.device_rows.prompt_length[:padded] + count - 1
        layout = DecodeLayout(self.prefixes, self.own, seating, positions[:rows], count[:rows])
        with laid_out(self.trunk):
            hidden = self.trunk(
                # embedded here, because some models look for padding among token ids, and wait for the answer
                inputs_embeds=self.embed(self.device_rows.token[:padded].unsqueeze(1)),
                position_ids=positions.unsqueeze(1),
                use_cache=False,
                layout=layout,
            ).last_hidden_state[:, 0]
        self.emit(0, rows, self.project(hidden)[:rows], self.recorded.take())

    def emit(self, start: int, stop: int, logits: Tensor, routes: Tensor | None) -> None:
        """Sample the next token of rows [start, stop) from their ``logits``; ``routes`` are those of their states."""
        count, job = self.device_rows.count[start:stop], self.device_rows.job[start:stop]
        logp = log_distribution(logits, self.sampling, step=count, ends=self.end_ids)
        self.finite.logical_and_(torch.isfinite(logp.amax(-1)).all())
        at = count.clamp(max=self.sampling.max_new_tokens)
        token = draw(logp, self.u[job, at], greedy=self.sampling.temperature == 0)
        self.tokens[job, at] = token
        self.logprobs[job, at] = logp.gather(1, token.unsqueeze(1)).squeeze(1)
        if self.routes is not None and routes is not None:
            self.routes[job, at] = routes[: stop - start]
        self.device_rows.token[start:stop] = token
        count.add_(1)

    def seat(self, rows: Sequence[InFlight], reach: int) -> Seating:
        """The ``rows`` by slot, and the shape of steps in which they have up to ``reach`` tokens."""
        members: list[list[int]] = [[] for _ in self.slots]
        slot_of = {request: slot for slot, request in enumerate(self.slots)}
        for place, row in enumerate(rows):
            members[slot_of[row.request]].append(place)
        lengths = [len(self.prompts[request]) for request in self.slots]
        shape = Shape(
            rows=len(rows),
            slots=len(self.slots),
            members=-(-max(map(len, members)) // 4) * 4,
            prefix_reach=extent(max(lengths), self.device),
            own_reach=extent(reach, self.device),
        )
        if self.graphed and rows is self.rows:
            shape = graph_shape(shape, self.prefixes, self.own)
        return Seating.of(members, lengths, shape, self.device)

    def retire(self) -> None:
        """Look at the new tokens; completions that have ended leave, and so do prompts with no completion left.
        Episodes that have ended a turn ask their environment, and those that have an answer go on."""
        ended = [row for row, seen in zip(self.rows, self.look(), strict=True) if self.ended(row, seen)]
        asking = [row for row in [*self.rows, *self.aside] if row.answer is not None]
        answered = self.answered(asking) if asking else []
        over = [row for row in ended if row.answer is None and row.episode is None]
        over += [row for row in answered if row.episode is not None and row.episode.finish]
        if not over and not asking:
            return
        left = [row for row in [*self.rows, *self.aside] if row not in over]
        self.arrange([row for row in left if row.answer is None], [row for row in left if row.answer is not None])
        self.go_on([row for row in answered if row not in over])
        if over:
            self.leave()
            self.hand_out(over)

    def look(self) -> list[list[int]]:
        """The new tokens of each row."""
        if not self.rows:
            return []
        new = max(row.sampled - len(row.ids) for row in self.rows)
        jobs = torch.tensor([row.job for row in self.rows], device=self.device)
        first = torch.tensor([len(row.ids) for row in self.rows], device=self.device)
        at = (first.unsqueeze(1) + torch.arange(new, device=self.device)).clamp(max=self.sampling.max_new_tokens)
        tokens = self.tokens[jobs.unsqueeze(1), at].tolist()
        if not self.finite:
            raise diverged()
        return [seen[: row.sampled - len(row.ids)] for row, seen in zip(self.rows, tokens, strict=True)]

    def ended(self, row: InFlight, tokens: Sequence[int]) -> bool:
        """Take the row's new tokens up to the end of its turn, and say whether it was among them."""
        for token in tokens:
            if row.episode is not None and self.calls is not None:
                if row.episode.emitted(token):
                    row.answer = self.calls.ask(row.episode.environment.step, row.episode.action)
                    return True
                continue
            row.ids.append(token)
            if self.ending.reason(row.ids, after=self.prompts[row.request]):
                return True
        return False

    def answered(self, asking: Sequence[InFlight]) -> list[InFlight]:
        """Those whose environment has answered, after a moment's patience, or as long as nothing else can be done."""
        assert self.calls is not None
        answers = [row.answer for row in asking if row.answer is not None]
        self.calls.wait(answers, patience=PATIENCE)
        if len(asking) == len(self.rows) + len(self.aside) and not self.may_admit():
            self.calls.any_of(answers)
        found = [row for row in asking if row.answer is not None and row.answer.done()]
        for row in found:
            row.hear()
        return found

    def go_on(self, rows: Sequence[InFlight]) -> None:
        """Let episodes sample their next turn: the device is told what the host knows, and what lies between the last
        token that was run and the last one that there is runs through the model, as many tokens at once as rows have
        in common."""
        if not rows:
            return
        place = {id(row): at for at, row in enumerate(self.rows)}
        self.device_rows.put([place[id(row)] for row in rows], rows, [len(self.prompts[row.request]) for row in rows])
        by_length: dict[int, list[InFlight]] = {}
        for row in rows:
            assert row.episode is not None
            row.sampled = len(row.ids)
            if shown := len(row.ids) - row.episode.turns[-1].stop:
                by_length.setdefault(shown, []).append(row)
        for shown, members in sorted(by_length.items()):
            self.show(members, [place[id(row)] for row in members], shown)

    def show(self, rows: Sequence[InFlight], places: Sequence[int], new: int) -> None:
        """Run ``new`` tokens of each of ``rows``, which are at ``places``: all that it has after the last one that was
        run, but for its last one, which the next step runs."""
        self.tally.shown_tokens += new * len(rows)
        ids, positions, counts = shown_tokens(rows, [len(self.prompts[row.request]) for row in rows], new)
        layout = DecodeLayout(
            self.prefixes,
            self.own,
            self.seat(rows, int(counts.max())),
            positions[: len(rows), -1].to(self.device),
            counts.to(self.device),
            new=new,
            places=torch.tensor(places, device=self.device),
        )
        with laid_out(self.trunk):
            self.trunk(
                inputs_embeds=self.embed(ids.to(self.device)),
                position_ids=positions.to(self.device),
                use_cache=False,
                layout=layout,
            )
        self.recorded.take()

    def arrange(self, active: Sequence[InFlight], aside: Sequence[InFlight]) -> None:
        """Give the rows these places; on the device, only ``active`` ones are sampled."""
        before = [*self.rows, *self.aside]
        self.rows, self.aside, targets, sources = arranged(before, active, aside)
        self.seating = None
        if targets:
            moves = (torch.tensor(targets, device=self.device), torch.tensor(sources, device=self.device))
            self.own.move(*moves)
            self.device_rows.move(*moves)
        self.device_rows.job[len(self.rows) :] = self.spare

    def leave(self) -> None:
        """Prompts with no completion left leave their slots."""
        needed = {row.request for row in [*self.rows, *self.aside, *list(self.waiting)[:1]]}
        idle = [slot for slot, request in enumerate(self.slots) if request not in needed]
        targets, sources = gaps(idle, len(self.slots))
        if targets:
            self.prefixes.move(*(torch.tensor(places, device=self.device) for places in (targets, sources)))
        for members in (self.slots, self.slot_states, self.slot_routes):
            close(members, targets, sources, len(idle))

    def hand_out(self, over: Sequence[InFlight]) -> None:
        """Give the completions of each request of which none is left."""
        for row in over:
            ended = self.over[row.request]
            ended.append(row)
            if len(ended) == self.sizes[row.request]:
                self.finished(row.request, [self.completion(one) for one in sorted(ended, key=lambda one: one.job)])

    def completion(self, row: InFlight) -> Completion:
        """The completion of a row that has ended."""
        after = self.prompts[row.request]
        found = completion_of(
            row,
            self.logprobs[row.job].tolist(),
            None if self.routes is None else self.routes[row.job].tolist(),
            text=text_of(self.tokenizer, row.ids, after=after),
            finish_reason=self.ending.reason(row.ids, after=after) if row.episode is None else row.episode.finish,
            version=self.version,
        )
        self.tally.new_tokens += sum(found.mask)
        return found
