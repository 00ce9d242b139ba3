"""The rollout engine of this process: each prompt through the model once, its keys stored once for all its completions.

Completions in flight are rows of one batch. A row that finishes leaves at once and a waiting completion takes its
place, under a budget for the cache, so that a call may ask for any number of completions. What a completion is depends
on its own seed alone: on a CPU in float32 bit by bit, whatever the batch, its place and the order of refilling
(:mod:`tether.generation.cache` says what that takes); elsewhere up to the rounding of products in other shapes.

On CUDA a step of decoding is one graph, captured for each shape it takes, with no Python between its layers; the host
looks at the tokens every :data:`STRIDE` steps and drops what was sampled past an end.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.batching import within_budget
from tether.errors import GuardError
from tether.generation.cache import DecodeLayout, Pool, PrefillLayout, Seating, aligned, extent
from tether.generation.sampling import draw, log_distribution, uniforms
from tether.generation.stopping import finish_of, text_of
from tether.interruption import check
from tether.models.attention import laid_out
from tether.models.loading import eos_ids
from tether.models.memory import within_memory
from tether.models.policy import project, replace_weights
from tether.types import Budget, Completion, Metrics, Prompt, RolloutGroup, Sampling

T = TypeVar("T")

STRIDE = 8
"""Decoding steps on CUDA between two looks of the host."""
PREFILL_TOKENS = 8192
"""Prompt tokens of one forward pass; a longer prompt is one by itself."""


CACHE_GIB = 4.0
"""For the cache on a CPU, unless the budget says otherwise."""


@dataclass
class Tally:
    """What a call of :meth:`Engine.generate` did."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    row_steps: int = 0
    """Rows at work, summed over decoding steps."""
    slot_steps: int = 0
    """Rows there was room for, summed over decoding steps."""
    cache_bytes: int = 0
    """The most that was allocated."""

    def metrics(self) -> Metrics:
        return {
            "sampling/prefill_tokens_per_second": self.prompt_tokens / max(self.prefill_seconds, 1e-9),
            "sampling/decode_tokens_per_second": self.new_tokens / max(self.decode_seconds, 1e-9),
            "sampling/slot_occupancy": self.row_steps / max(self.slot_steps, 1),
            "sampling/cache_gib": self.cache_bytes / 2**30,
        }


class Engine:
    """A :class:`tether.types.Generator` that samples from the very module that is being trained: no weights are copied
    as long as :meth:`load_weights` is given that module's own tensors."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, budget: Budget | None = None):
        self.model, self.tokenizer, self.budget = model, tokenizer, budget or Budget()
        self.version = 0
        self.tally = Tally()

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into the model where they are not its own already; the next rollout carries ``version``."""
        replace_weights(self.model, weights)
        self.version = version

    def figures(self) -> Metrics:
        """Tokens a second of prefill and of decoding, the share of rows at work, and the cache's memory."""
        return self.tally.metrics()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        """``group_size`` completions of each prompt; completion j of prompt i is decided by (seed, i, j)."""
        self.tally = Tally()
        done: dict[int, list[Completion]] = {}
        for band in bands([len(prompt.ids) for prompt in prompts], self.model.device):
            done |= self._roll_out({i: prompts[i] for i in band}, group_size, sampling, seed)
        return [
            RolloutGroup(prompt=prompt, completions=tuple(done[i]), weights_version=self.version)
            for i, prompt in enumerate(prompts)
        ]

    def _roll_out(
        self, prompts: dict[int, Prompt], group_size: int, sampling: Sampling, seed: int
    ) -> dict[int, list[Completion]]:
        """All completions of some prompts. Each time that memory runs out, half as many are in flight from then on."""

        def attempt(rows: int) -> dict[int, list[Completion]]:
            self.budget = replace(self.budget, max_rows=rows)
            return Rollout(self, prompts, group_size, sampling, seed).run()

        asked = self.budget
        jobs = len(prompts) * group_size
        found, rows = within_memory(attempt, min(asked.max_rows, jobs))
        if rows == min(asked.max_rows, jobs):
            self.budget = asked
        return found


def bands(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Prompts by length, longest first, cut where one takes less than half of the longest's room: a pool has one
    capacity for all its slots."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and 2 * extent(lengths[i], device) >= extent(lengths[found[-1][0]], device):
            found[-1].append(i)
        else:
            found.append([i])
    return found


@dataclass
class Row:
    """A completion in flight, as the host knows it."""

    prompt: int
    member: int
    job: int
    """Its number among all completions of the rollout."""
    ids: list[int] = field(default_factory=list)
    """The tokens that the host has looked at."""
    sampled: int = 0
    """Tokens that the device has sampled."""


@dataclass(frozen=True)
class DeviceRows:
    """The rows on the device, [capacity] int64 each. Tensors are changed in place alone, so that graphs can replay."""

    token: Tensor
    """The last token sampled, which the next step runs."""
    count: Tensor
    """Tokens sampled so far; at least 1 in places that nobody has."""
    prompt_length: Tensor
    job: Tensor
    """A number that no completion has in places that nobody has."""

    @staticmethod
    def empty(capacity: int, *, nobody: int, device: torch.device) -> DeviceRows:
        token, count, prompt_length, job = (
            torch.full((capacity,), value, dtype=torch.int64, device=device) for value in (0, 1, 1, nobody)
        )
        return DeviceRows(token, count, prompt_length, job)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token, self.count, self.prompt_length, self.job


class Rollout:
    """A band of prompts from first to last: admit completions, decode, retire those that are over, and so on.

    Rows and slots are dense: rows [0, n) of the own pool are ``rows``, slots [0, s) of the prefix pool are ``slots``.
    """

    def __init__(
        self, engine: Engine, prompts: dict[int, Prompt], group_size: int, sampling: Sampling, seed: int
    ) -> None:
        self.model, self.tokenizer, self.tally = engine.model, engine.tokenizer, engine.tally
        self.prompts, self.group_size, self.sampling, self.seed = prompts, group_size, sampling, seed
        self.device = self.model.device
        self.graphed = graphed(self.device)
        self.trunk, self.project = self.model.base_model, project(self.model)
        self.embed = self.model.get_input_embeddings()
        self.ends = eos_ids(self.model, self.tokenizer)
        self.end_ids = torch.tensor(self.ends, dtype=torch.int64, device=self.device)

        jobs = len(prompts) * group_size
        self.waiting = deque(
            Row(prompt=i, member=j, job=k * group_size + j) for k, i in enumerate(prompts) for j in range(group_size)
        )
        longest = max(len(prompt.ids) for prompt in prompts.values())
        prefix_room, own_room = (extent(n, self.device) for n in (longest, sampling.max_new_tokens))
        self.capacity, slots = places(
            jobs,
            len(prompts),
            max_rows=engine.budget.max_rows,
            cache_bytes=cache_bytes(engine.budget, self.device),
            prefix_room=prefix_room,
            own_room=own_room,
            token_bytes=Pool.bytes_per_token(self.model),
        )
        self.prefixes, self.own = Pool(self.model, slots, prefix_room), Pool(self.model, self.capacity, own_room)
        self.tally.cache_bytes = max(self.tally.cache_bytes, self.prefixes.data.nbytes + self.own.data.nbytes)

        self.rows: list[Row] = []
        self.slots: list[int] = []
        self.slot_states: list[Tensor] = []
        """The hidden state behind each slot's prompt: its completions' first tokens are drawn from it."""
        self.seating: Seating | None = None
        """Of the rows and slots as they are, once it has been asked for."""
        self.device_rows = DeviceRows.empty(aligned(self.capacity), nobody=jobs, device=self.device)
        # one job more, nobody's, and one token more, for what is sampled past a completion's end
        shape = (jobs + 1, sampling.max_new_tokens + 1)
        self.u = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.step: Callable[[Seating], None] = GraphedStep(self.decode_step) if self.graphed else self.decode_step
        self.over: list[Row] = []

    def run(self) -> dict[int, list[Completion]]:
        started, prefill = time.monotonic(), self.tally.prefill_seconds
        while self.waiting or self.rows:
            check()
            if self.may_admit():
                self.admit()
            else:
                self.decode()
            self.retire()
        completions = self.completions()
        self.tally.decode_seconds += time.monotonic() - started - (self.tally.prefill_seconds - prefill)
        return completions

    def may_admit(self) -> bool:
        """Whether somebody waits and there is room: for an eighth of all rows at least, so that prompts are prefilled
        together."""
        if not self.waiting:
            return False
        room = self.capacity - len(self.rows)
        seated = self.waiting[0].prompt in self.slots or len(self.slots) < self.prefixes.places
        return seated and room >= max(1, min(len(self.waiting), self.capacity // 8))

    def admit(self) -> None:
        """Seat waiting completions, prefill the prompts that are new, and draw the first tokens."""
        started = time.monotonic()
        newcomers: list[Row] = []
        fresh: list[int] = []
        while self.waiting and len(self.rows) + len(newcomers) < self.capacity:
            prompt = self.waiting[0].prompt
            if prompt not in self.slots and prompt not in fresh:
                if len(self.slots) + len(fresh) == self.prefixes.places:
                    break
                fresh.append(prompt)
            newcomers.append(self.waiting.popleft())
        for part in within_budget([0] * len(fresh), [len(self.prompts[i].ids) for i in fresh], fresh, PREFILL_TOKENS):
            self.prefill([fresh[k] for k in part.tolist()])
        if self.graphed:
            torch.cuda.synchronize(self.device)
        self.tally.prefill_seconds += time.monotonic() - started

        start, stop = len(self.rows), len(self.rows) + len(newcomers)
        self.rows += newcomers
        self.seating = None
        jobs = [row.job for row in newcomers]
        lengths = [len(self.prompts[row.prompt].ids) for row in newcomers]
        for tensor, values in zip(
            self.device_rows.tensors(), ([0] * len(jobs), [0] * len(jobs), lengths, jobs), strict=True
        ):
            tensor[start:stop] = torch.tensor(values, device=self.device)
        drawn = [uniforms(self.seed, row.prompt, row.member, self.sampling.max_new_tokens) for row in newcomers]
        self.u[jobs, :-1] = torch.stack(drawn).to(self.device)
        slot_of = {prompt: slot for slot, prompt in enumerate(self.slots)}
        states = torch.stack([self.slot_states[slot_of[row.prompt]] for row in newcomers])
        padded = torch.cat([states, states.new_zeros(aligned(len(states)) - len(states), states.size(1))])
        self.emit(start, stop, self.project(padded)[: len(states)])
        for row in newcomers:
            row.sampled = 1

    def prefill(self, prompts: Sequence[int]) -> None:
        """Run prompts through the model, packed one behind the other, into the next slots."""
        ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for slot, prompt in enumerate(prompts, len(self.slots)):
            tokens = self.prompts[prompt].ids
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
        self.slots += prompts
        self.slot_states += [hidden[start + length - 1].clone() for _, start, length in spans]

    def decode(self) -> None:
        """One step on a CPU; :data:`STRIDE` steps on CUDA, unless a stop string has to be looked for."""
        steps = STRIDE if self.graphed and not self.sampling.stop else 1
        reach = min(max(row.sampled for row in self.rows) + steps - 1, self.sampling.max_new_tokens)
        if self.seating is None or reach > self.seating.own_reach:
            self.seating = self.seat(reach)
        for _ in range(steps):
            self.step(self.seating)
        for row in self.rows:
            row.sampled += steps
        self.tally.row_steps += steps * len(self.rows)
        self.tally.slot_steps += steps * self.capacity

    def decode_step(self, seating: Seating) -> None:
        """Run the last token of rows [0, seating.rows) and sample the next. Nothing in it waits for the device."""
        padded = aligned(seating.rows)
        count = self.device_rows.count[:padded].clamp(max=self.sampling.max_new_tokens)
        positions = self.device_rows.prompt_length[:padded] + count - 1
        layout = DecodeLayout(self.prefixes, self.own, seating, positions[: seating.rows], count[: seating.rows])
        with laid_out(self.trunk):
            hidden = self.trunk(
                # embedded here, because some models look for padding among token ids, and wait for the answer
                inputs_embeds=self.embed(self.device_rows.token[:padded].unsqueeze(1)),
                position_ids=positions.unsqueeze(1),
                use_cache=False,
                layout=layout,
            ).last_hidden_state[:, 0]
        self.emit(0, seating.rows, self.project(hidden)[: seating.rows])

    def emit(self, start: int, stop: int, logits: Tensor) -> None:
        """Sample the next token of rows [start, stop) from their ``logits``."""
        count, job = self.device_rows.count[start:stop], self.device_rows.job[start:stop]
        logp = log_distribution(logits, self.sampling, step=count, ends=self.end_ids)
        self.finite.logical_and_(torch.isfinite(logp.amax(-1)).all())
        at = count.clamp(max=self.sampling.max_new_tokens)
        token = draw(logp, self.u[job, at], greedy=self.sampling.temperature == 0)
        self.tokens[job, at] = token
        self.logprobs[job, at] = logp.gather(1, token.unsqueeze(1)).squeeze(1)
        self.device_rows.token[start:stop] = token
        count.add_(1)

    def seat(self, reach: int) -> Seating:
        """Where everybody sits. On CUDA shapes come in a few sizes only, for the sake of the graphs."""
        members: list[list[int]] = [[] for _ in self.slots]
        slot_of = {prompt: slot for slot, prompt in enumerate(self.slots)}
        for place, row in enumerate(self.rows):
            members[slot_of[row.prompt]].append(place)
        rows, slots, width = len(self.rows), len(self.slots), -(-max(map(len, members)) // 4) * 4
        lengths = [len(self.prompts[prompt].ids) for prompt in self.slots]
        prefix_reach, own_reach = extent(max(lengths), self.device), extent(reach, self.device)
        if self.graphed:
            rows, width = min(power_of_two(rows), self.capacity), power_of_two(width)
            slots, prefix_reach = self.prefixes.places, self.prefixes.capacity
            own_reach = min(-(-reach // 256) * 256, self.own.capacity)
        grid = torch.zeros(slots, width, dtype=torch.int64)
        seats = torch.zeros(rows, dtype=torch.int64)
        for slot, places_of in enumerate(members):
            for k, place in enumerate(places_of):
                grid[slot, k] = place
                seats[place] = slot * width + k
        return Seating(
            rows=rows,
            slots=slots,
            grid=grid.flatten().to(self.device),
            seats=seats.to(self.device),
            prefix_lengths=torch.tensor(lengths + [1] * (slots - len(lengths)), device=self.device),
            prefix_reach=prefix_reach,
            own_reach=own_reach,
        )

    def retire(self) -> None:
        """Look at the new tokens; completions that are over leave, and so do prompts with no completion left."""
        new = max(row.sampled - len(row.ids) for row in self.rows)
        jobs = torch.tensor([row.job for row in self.rows], device=self.device)
        first = torch.tensor([len(row.ids) for row in self.rows], device=self.device)
        at = (first.unsqueeze(1) + torch.arange(new, device=self.device)).clamp(max=self.sampling.max_new_tokens)
        tokens = self.tokens[jobs.unsqueeze(1), at].tolist()
        if not self.finite:
            raise GuardError("generation: the logits are not finite; the policy's weights have diverged")
        gone = [
            place
            for place, (row, seen) in enumerate(zip(self.rows, tokens, strict=True))
            if self.ended(row, seen[: row.sampled - len(row.ids)])
        ]
        if not gone:
            return
        self.seating = None
        self.over += [self.rows[place] for place in gone]
        before = len(self.rows)
        self.rows = self._close_ranks(self.rows, gone, (self.own.move, self._move_rows))
        self.device_rows.job[len(self.rows) : before] = len(self.tokens) - 1
        needed = {row.prompt for row in self.rows} | {row.prompt for row in list(self.waiting)[:1]}
        idle = [slot for slot, prompt in enumerate(self.slots) if prompt not in needed]
        states = self._close_ranks(self.slot_states, idle, ())
        self.slots, self.slot_states = self._close_ranks(self.slots, idle, (self.prefixes.move,)), states

    def ended(self, row: Row, tokens: Sequence[int]) -> bool:
        """Take the row's new tokens up to its end, and say whether it was among them."""
        for token in tokens:
            row.ids.append(token)
            if finish_of(row.ids, self.sampling, self.ends, self.tokenizer):
                return True
        return False

    def _move_rows(self, targets: Tensor, sources: Tensor) -> None:
        for tensor in self.device_rows.tensors():
            tensor[targets] = tensor[sources]

    def _close_ranks(
        self, members: list[T], gone: Sequence[int], moves: Sequence[Callable[[Tensor, Tensor], None]]
    ) -> list[T]:
        """``members`` without those at ``gone``, whose places the last ones take; ``moves`` do the same elsewhere."""
        left = len(members) - len(gone)
        targets = [place for place in gone if place < left]
        sources = sorted(set(range(left, len(members))) - set(gone))
        kept = list(members)
        for target, source in zip(targets, sources, strict=True):
            kept[target] = members[source]
        if targets:
            for move in moves:
                move(torch.tensor(targets, device=self.device), torch.tensor(sources, device=self.device))
        return kept[:left]

    def completions(self) -> dict[int, list[Completion]]:
        """All completions, by prompt."""
        logprobs = self.logprobs.tolist()
        found: dict[int, list[Completion]] = {prompt: [] for prompt in self.prompts}
        for row in sorted(self.over, key=lambda row: row.job):
            finish = finish_of(row.ids, self.sampling, self.ends, self.tokenizer)
            assert finish is not None
            self.tally.new_tokens += len(row.ids)
            found[row.prompt].append(
                Completion(
                    ids=tuple(row.ids),
                    logprobs=tuple(logprobs[row.job][: len(row.ids)]),
                    finish=finish,
                    text=text_of(self.tokenizer, row.ids, after=self.prompts[row.prompt].ids),
                )
            )
        return found


def cache_bytes(budget: Budget, device: torch.device) -> int:
    """What keys and values may take."""
    if budget.cache_gib is not None:
        return int(budget.cache_gib * 2**30)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(CACHE_GIB * 2**30)


def places(
    jobs: int, prompts: int, *, max_rows: int, cache_bytes: int, prefix_room: int, own_room: int, token_bytes: int
) -> tuple[int, int]:
    """Rows and slots, one of each at least. Where not all of them fit, there are a quarter more slots than full groups
    need, because groups finish raggedly."""
    group_size = jobs // prompts
    share = prefix_room * (1.25 if group_size > 1 else 1.0) / group_size
    affordable = int(cache_bytes / (token_bytes * (own_room + share)))
    rows = max(1, min(jobs, max_rows, affordable))
    return rows, min(prompts, rows, -(-5 * rows // (4 * group_size)) if group_size > 1 else rows)


def graphed(device: torch.device) -> bool:
    """Whether decoding steps are captured as graphs."""
    return device.type == "cuda"


def power_of_two(n: int) -> int:
    """The least power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


class GraphedStep:
    """A decoding step on CUDA as one graph for each shape of its seating.

    A shape's first steps run as they are, on a stream of their own, which is the warm-up that capture asks for; then
    the step is captured, once, and replayed. Capture runs nothing, so no step is lost or done twice.
    """

    WARM_UP = 2

    def __init__(self, step: Callable[[Seating], None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.seatings: dict[tuple[int, ...], Seating] = {}
        self.runs: Counter[tuple[int, ...]] = Counter()
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def __call__(self, seating: Seating) -> None:
        shape = (seating.rows, seating.slots, seating.members, seating.prefix_reach, seating.own_reach)
        static = self.seatings.setdefault(shape, seating)
        if static is not seating:  # a graph reads the tensors that it was captured with
            for target, source in zip(static.tensors(), seating.tensors(), strict=True):
                target.copy_(source)
        if shape in self.graphs:
            self.graphs[shape].replay()
            return
        self.runs[shape] += 1
        if self.runs[shape] > self.WARM_UP:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(static)
            self.graphs[shape] = graph
            graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(static)
        torch.cuda.current_stream().wait_stream(self.stream)
