"""How much memory a run takes: a dry run of its largest step, without memory (:mod:`tether.models.dry_run`).

    peak = the process + what is held all the time + slack * the phase of a step that needs most

Held are weights, their rounded copies, a reference, a critic, reward models, and for what is trained float32 masters
and AdamW's two moments. The phases are sampling (keys and values, and the distributions of a step), scoring, the
reference's pass, and the update: activations, logits and gradients of the largest micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.data.batching import within_budget
from tether.errors import ModelError, TetherError, reason_of
from tether.generation.cache import Pool, extent
from tether.generation.engine import bands, cache_bytes, rows_and_slots
from tether.generation.sampling import draw, log_distribution
from tether.generation.scheduler import PREFILL_TOKENS
from tether.models.adapters import add_adapter, is_adapted, of_adapter
from tether.models.checkpointing import checkpoint_activations
from tether.models.dry_run import Allocated, saved_by_quantising, shell, states, without_memory
from tether.models.linear import round_matmuls
from tether.models.masters import master_of
from tether.models.policy import Critic, project
from tether.models.reward import TOKEN_BUDGET, head_of
from tether.models.trainable import changing, trainable
from tether.models.unpacked import is_unpacked
from tether.ops.logprobs import chunk_rows, chunked_logprobs
from tether.runtime.device import Dtype, pick_dtype
from tether.training.step_time import Amounts, amounts_of
from tether.training.workload import Row, Sampled, Workload
from tether.types import Batch, PromptCompletion

HOST = torch.device("cpu")
"""Where lengths are."""


LIBRARIES = 120 * 2**20
"""Bytes that a process grows by when it first trains on a CPU: threads, and buffers of the libraries."""
CPU_SLACK = 1.35
"""Memory that glibc takes from the system for what a phase allocates, over what it allocates: 1.0 to 1.6 in the
configurations of ``benchmarks/memory_estimate.py``, with glibc 2.36, which reuses aligned blocks poorly. CUDA's
allocator counts what is allocated."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a run on its device."""

    process: int
    """Of the process itself: Python and its libraries, on a CPU."""
    held: Mapping[str, int]
    """What is there all the time, by part."""
    phases: Mapping[str, int]
    """The most that each phase of a step needs on top, with the slack of the allocator."""
    update: Mapping[str, int]
    """What the update needs, by part; the largest of them need not be there at the same time."""
    amounts: Amounts
    """What a step computes."""

    @property
    def peak(self) -> int:
        return self.process + sum(self.held.values()) + self.phases[self.worst]

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass
class DryRun:
    """The models of a run without memory, and what they take."""

    work: Workload
    matmul_dtype: Dtype
    device: torch.device
    """Where the run is to be."""
    memory: int | None
    """Bytes of the device, where it is not one of this machine."""
    allocated: Allocated
    held: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)
    judges: list[PreTrainedModel] = field(default_factory=list)
    in_flight: int = 1
    """Completions at once."""

    def run(self) -> Amounts:
        policy = self.load()
        critics = self.beside(policy)
        self.optimizer([policy, *critics])
        if self.work.sampled is not None:
            self.sample(policy, self.work.sampled)
        if self.work.reference:
            with self.allocated.at_most(self.phases, "reference pass"), torch.no_grad():
                part, _ = self.largest()
                self.head(policy, states(policy.base_model, batch_of(part), ends=False), entropy=False)
        self.descend(policy, critics)
        trunks = [cast(PreTrainedModel, critic.trunk) for critic in critics if critic.trunk is not None]
        return amounts_of(self.work, policy, trunks, self.judges, in_flight=self.in_flight)

    def load(self) -> PreTrainedModel:
        """The model that is trained, as the options have it."""
        run, form = self.work.run, self.work.policy
        parts: dict[str, int] = {}
        with self.allocated.held(parts, "all"):
            model = shell(form, dtype=pick_dtype(run.device.dtype), classifier=self.work.kind == "reward model")
            if run.lora.lora_rank and form.adapter is None:
                add_adapter(model, run.lora, seed=0)
        adapter = sum(weight.nbytes for name, weight in trainable(model).items() if of_adapter(name))
        self.held |= {"weights": parts["all"] - adapter, "adapter": adapter}
        if run.device.quantise != "none":
            self.held["weights"] -= saved_by_quantising(model, run.device.quantise)
        if self.matmul_dtype == "bfloat16":
            with self.allocated.held(self.held, "rounded copies of weights"):
                round_matmuls(model)
        if run.checkpoint_activations:
            checkpoint_activations(model)
        return model

    def beside(self, policy: PreTrainedModel) -> list[Critic]:
        """What is held beside the policy; gives the critic."""
        work, critics = self.work, list[Critic]()
        if work.reference:
            with self.allocated.held(self.held, "reference"):
                if not is_adapted(policy):
                    self.kept.append(copy.deepcopy(policy))
                elif work.policy.adapter is not None:
                    self.kept.append([weight.detach().clone() for weight in trainable(policy).values()])
        if work.critic != "none":
            with self.allocated.held(self.held, "critic"):
                critics.append(Critic(policy, own_trunk=work.critic == "trunk"))
        if work.best_weights:
            with self.allocated.held(self.held, "best weights"):
                self.kept.append([weight.detach().clone() for weight in changing(policy).values()])
        for form in work.sampled.reward_models if work.sampled else ():
            with self.allocated.held(self.held, "reward models"):
                judge = shell(form, dtype=policy.dtype, classifier=True).requires_grad_(False)
                if self.matmul_dtype == "bfloat16":
                    round_matmuls(judge)
            self.score(judge)
            self.judges.append(judge)
        return critics

    def optimizer(self, trained: Iterable[nn.Module]) -> None:
        """Masters and moments of what is trained."""
        weights = [weight for module in trained for weight in trainable(module).values()]
        with self.allocated.held(self.held, "master weights"):
            masters = [master_of(weight) for weight in weights]
        with self.allocated.held(self.held, "optimizer"):
            self.kept += [torch.zeros_like(master) for master in masters for _ in range(2)]

    def sample(self, policy: PreTrainedModel, sampled: Sampled) -> None:
        """Keys and values of the largest rollout, and the forward pass of its prompts or the distributions of a
        step."""
        for groups in filter(None, (sampled.groups, sampled.evaluated)):
            rows, cache = self.cache(policy, groups, sampled)
            self.in_flight = max(self.in_flight, rows)
            working: dict[str, int] = {}
            with self.allocated.at_most(working, "prompts"), torch.no_grad():
                prompts = [(max(1, prompt - 1), [1]) for prompt, _ in groups]
                states(policy.base_model, batch_of(largest_part(prompts, PREFILL_TOKENS)[0]), ends=True)
            with self.allocated.at_most(working, "step"), torch.no_grad():
                count, width = min(rows, sum(len(own) for _, own in groups)), hidden_width(policy)
                logits = project(policy)(torch.empty(count, width, dtype=policy.dtype))
                step, ends = torch.zeros(count, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
                logp = log_distribution(logits, sampled.sampling, step=step, ends=ends)
                draw(logp, torch.empty(count, dtype=torch.float64), greedy=sampled.sampling.temperature == 0)
            self.phases["sampling"] = max(self.phases.get("sampling", 0), cache + max(working.values()))

    def cache(self, policy: PreTrainedModel, groups: Sequence[Row], sampled: Sampled) -> tuple[int, int]:
        """Completions in flight, and the bytes of their keys and values, at most."""
        per_token, budget, found = Pool.bytes_per_token(policy), sampled.budget, [(1, 0)]
        if budget.cache_gib is None and self.memory is not None:
            most = self.memory // 2
        else:
            most = cache_bytes(budget, self.device)
        limit = extent(sampled.sampling.max_new_tokens, self.device)
        if is_unpacked(policy):
            rows = min(budget.max_rows, max(len(own) for _, own in groups))
            return rows, rows * per_token * max(prompt + limit for prompt, _ in groups)
        for band in bands([prompt for prompt, _ in groups], self.device):
            slot = extent(max(groups[i][0] for i in band), self.device)
            rows, slots = rows_and_slots(
                sum(len(groups[i][1]) for i in band),
                len(band),
                max_rows=budget.max_rows,
                cache_bytes=most,
                slot_tokens=slot,
                row_tokens=limit,
                token_bytes=per_token,
            )
            found.append((rows, per_token * (rows * limit + slots * slot)))
        return max(found, key=lambda one: one[1])

    def score(self, judge: PreTrainedModel) -> None:
        """The pass of a reward model over all completions."""
        assert self.work.sampled is not None
        part, _ = largest_part(self.work.sampled.groups, TOKEN_BUDGET)
        if part:
            with self.allocated.at_most(self.phases, "scoring"), torch.no_grad():
                head_of(judge)(states(judge.base_model, batch_of(part), ends=True))

    def largest(self) -> tuple[list[Row], int]:
        """The largest micro-batch of the update, and how many there are."""
        return largest_part(self.work.rows, self.work.micro_batch_tokens, paired=self.work.paired)

    def head(self, policy: PreTrainedModel, hidden: Tensor, *, entropy: bool) -> Tensor:
        row_bytes = 4 * project(policy)(hidden[:0]).size(-1)
        size = chunk_rows(len(hidden), row_bytes)
        if size < len(hidden):  # two chunks, of which the second adds its gradient to that of the first
            hidden = hidden[: 2 * size]
        ids = torch.zeros(len(hidden), dtype=torch.int64)
        logp, *_ = chunked_logprobs(hidden, ids, project(policy), entropy=entropy, logit_bytes=size * row_bytes)
        return logp.sum()

    def descend(self, policy: PreTrainedModel, critics: Sequence[Critic]) -> None:
        """Forward and backward pass of the largest micro-batch; of several, the second has the gradient of the first
        beside it."""
        part, count = self.largest()
        batch, scores, entropy = batch_of(part), self.work.kind == "reward model", self.work.entropy
        with self.allocated.at_most(self.phases, "update"):
            for _ in range(min(2, count)):
                parts: dict[str, int] = {}
                with self.allocated.held(parts, "activations"):
                    hidden = states(policy.base_model, batch, ends=scores)
                    own = [hidden if one.trunk is None else states(one.trunk, batch, ends=False) for one in critics]
                with self.allocated.at_most(parts, "logits"):
                    values = [critic.head(x).sum() for critic, x in zip(critics, own, strict=True)]
                    sum_of = head_of(policy)(hidden).sum() if scores else self.head(policy, hidden, entropy=entropy)
                    loss = sum(values, sum_of)
                del hidden, own, values, sum_of
                loss.backward()
                del loss
        weights = [weight for module in (policy, *critics) for weight in trainable(module).values()]
        grads = [grad for weight in weights if (grad := master_of(weight).grad) is not None]
        self.update = {**parts, "gradients": sum(grad.nbytes for grad in grads)}


def dry_run(
    work: Workload,
    *,
    matmul_dtype: Dtype,
    device: torch.device,
    process: int,
    memory: int | None = None,
) -> Footprint:
    """The footprint of ``work`` on ``device``, in a process that takes ``process`` bytes by itself; ``memory`` is what
    the device has where it is not one of this machine. Raises :class:`ModelError` where the architecture cannot be run
    without memory."""
    with without_memory() as allocated:
        one = DryRun(work, matmul_dtype, device, memory, allocated)
        try:
            amounts = one.run()
        except TetherError:
            raise
        except Exception as error:  # an architecture may look at values, or fail in any other way
            raise ModelError(
                f"its memory cannot be estimated ({reason_of(error)})", where=type(work.policy.config).__name__
            ) from error
    on_cpu = device.type == "cpu"
    return Footprint(
        process=process + LIBRARIES if on_cpu else 0,
        held={name: size for name, size in one.held.items() if size},
        phases={name: int(size * (CPU_SLACK if on_cpu else 1)) for name, size in one.phases.items()},
        update=one.update,
        amounts=amounts,
    )


def tokens(rows: Iterable[Row]) -> int:
    """Tokens that are run, each prompt's once."""
    return sum(prompt + sum(own) for prompt, own in rows)


def largest_part(rows: Sequence[Row], budget: int, *, paired: bool = False) -> tuple[list[Row], int]:
    """The micro-batch with the most tokens that :func:`tether.data.batching.micro_batches` makes of the rows, or of
    pairs :func:`tether.algorithms.reward_model.pair_batches`; and how many it makes."""
    items = [
        (owner, own)
        for owner, (_, lengths) in enumerate(rows)
        for own in ([lengths] if paired else [[length] for length in lengths])
    ]
    found: list[list[Row]] = []
    with HOST:
        owners = [owner for owner, _ in items]
        for part in within_budget([sum(own) for _, own in items], [rows[i][0] for i in owners], owners, budget):
            by_owner: dict[int, list[int]] = {}
            for owner, own in (items[k] for k in part.tolist()):
                by_owner.setdefault(owner, []).extend(own)
            found.append([(rows[owner][0], own) for owner, own in by_owner.items()])
    return max(found, key=tokens, default=[]), len(found)


def batch_of(rows: Sequence[Row]) -> Batch:
    """A batch of these lengths, in real memory; each row has a prompt of its own."""
    texts: list[PromptCompletion] = [
        ((number,) * max(1, prompt), (0,) * max(1, length))
        for number, (prompt, own) in enumerate(rows)
        for length in own
    ]
    with HOST:
        return Batch.collate(texts)


def hidden_width(model: PreTrainedModel) -> int:
    return int(cast(nn.Embedding, model.get_output_embeddings()).weight.size(1))
