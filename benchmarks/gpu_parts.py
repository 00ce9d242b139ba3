"""The parts of :mod:`benchmarks.gpu`: each is a function of a :class:`Case` that gives figures by name and unit."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.flops import SHAPES
from benchmarks.hardware import bandwidth, matrix_rate
from benchmarks.logprob_memory import chunked, full, measure
from benchmarks.workload import config_of
from tether.algorithms import grpo, ppo, reward_model, sft
from tether.algorithms.optimise import Optim
from tether.generation import scheduler
from tether.generation.engine import Engine
from tether.models.adapters import Lora, add_adapter
from tether.models.checkpointing import checkpoint_activations
from tether.models.linear import round_matmuls
from tether.models.loading import BASE, resolve
from tether.models.policy import completion_logprobs
from tether.models.reference import reference_of
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.runtime.checkpoint import Checkpoints, Kept, RunPosition
from tether.runtime.state import RunState
from tether.types import Batch, Demonstration, PreferencePair, Prompt, Sampling, make_requests

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, float | str]
SKIPPED = "skipped"
"""The figure that says why a part cannot run on this machine."""


@dataclass(frozen=True)
class Size:
    """How much a part does."""

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size


CARD, TOY = Size(8, 8, 128, 256), Size(2, 2, 8, 6)
"""On a GPU, and elsewhere."""
REPEATS = 3


@dataclass(frozen=True)
class Case:
    """What a part works with."""

    device: str
    shape: str
    size: Size

    def model(
        self, dtype: torch.dtype = torch.bfloat16, kind: Any = AutoModelForCausalLM
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Random weights, and a tokenizer without an end, so that all completions have the same length."""
        tokenizer = AutoTokenizer.from_pretrained(resolve(BASE), trust_remote_code=False)
        config = config_of(SHAPES[self.shape], tokenizer)
        config.num_labels = 1  # read by classifiers alone
        torch.manual_seed(0)
        with torch.device(self.device):
            model = kind.from_config(config, dtype=dtype).eval()
        if kind is AutoModelForCausalLM:
            model.generation_config.eos_token_id = None
        tokenizer.eos_token = None
        return model, tokenizer

    def ids(self, count: int, start: int) -> tuple[int, ...]:
        """Token ids that differ from one ``start`` to the next."""
        return tuple(3 + (start + 7 * t) % 500 for t in range(count))

    def prompts(self) -> list[Prompt]:
        return [Prompt(ids=self.ids(self.size.prompt_tokens, i), text="") for i in range(self.size.prompts)]

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.size.new_tokens)

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of a few runs, after one to warm up."""
        found = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1:])

    def peak(self) -> Figures:
        return {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if self.device == "cuda" else {}


def lacks(package: str) -> Figures:
    """What a part that needs a package gives where it is missing; nothing where it is there."""
    return {} if importlib.util.find_spec(package) else {SKIPPED: f"no {package} here"}


def hardware(case: Case) -> Figures:
    return {
        "float32 Tflop/s": matrix_rate(case.device, torch.float32) / 1e12,
        "bfloat16 Tflop/s": matrix_rate(case.device, torch.bfloat16) / 1e12,
        "GB/s": bandwidth(case.device) / 1e9,
    }


def rollout(*, graphs: bool = True, rounded: bool = False) -> Callable[[Case], Figures]:
    """A part that times sampling: without ``graphs`` each decoding step is launched operation by operation, as on a
    CPU; ``rounded`` weights are float32 and multiplied in bfloat16."""

    def part(case: Case) -> Figures:
        model, tokenizer = case.model(torch.float32 if rounded else torch.bfloat16)
        if rounded:
            round_matmuls(model)
        engine = Engine(model, tokenizer)
        asked = make_requests(case.prompts(), group_size=case.size.group_size, seed=0)
        used = graphs and scheduler.graphed(model, torch.device(case.device))
        with mock.patch.object(scheduler, "graphed", return_value=used):
            seconds = case.seconds(lambda: engine.generate(asked, sampling=case.sampling))
        return {"tokens/s": case.size.completions * case.size.new_tokens / seconds, "s": seconds, **case.peak()}

    return part


def sevens(completion_ids: list[list[int]]) -> list[float]:
    """A reward that varies and costs nothing."""
    return [sum(i % 7 == 0 for i in ids) / len(ids) for ids in completion_ids]


def updated(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """The metrics of a step, unless it was skipped: that would be no time of a step."""
    if "loss" not in metrics:
        raise RuntimeError(f"the step was skipped: {dict(metrics)}")
    return metrics


def online(algorithm: Any, *, lora: bool = False, activations: bool = False) -> Callable[[Case], Figures]:
    """A part that times a step of GRPO or PPO."""

    def part(case: Case) -> Figures:
        if lora and (skipped := lacks("peft")):
            return skipped
        model, tokenizer = case.model()
        if lora:
            add_adapter(model, Lora(lora_rank=16), seed=0)
        if activations:
            checkpoint_activations(model)
        group = case.size.group_size
        config = algorithm.Config(group_size=group, sampling=case.sampling, optim=Optim(learning_rate=1e-6))
        if algorithm is ppo:
            config = replace(config, epochs_per_step=1, minibatches=1)
        prompts = case.prompts()
        state = algorithm.State.create(
            model, config, reference=reference_of(model), prompts=len(prompts), total_steps=1000, seed=0
        )
        engine, score = Engine(model, tokenizer), WeightedSum(((FunctionReward("sevens", sevens), 1.0),))
        rows: list[Mapping[str, float]] = []

        def step() -> None:
            taken = state.cursor.take(prompts, len(prompts))
            found = algorithm.step(state, taken, generator=engine, scorer=score, config=config)
            rows.append(updated(found.metrics))

        seconds = case.seconds(step)
        last = rows[-1]
        return {
            "step s": seconds,
            "generate s": last["time/generate"],
            "update s": last["time/update"],
            "logprob gap nats": last["sampling/logprob_gap_mean"],
            **case.peak(),
        }

    return part


def demonstrations(case: Case) -> list[Demonstration]:
    size = case.size
    return [
        Demonstration(prompt_ids=case.ids(size.prompt_tokens, i), completion_ids=case.ids(size.new_tokens, i + 1))
        for i in range(size.completions)
    ]


def timed(case: Case, step: Callable[[], Any], sequences: Sequence[int]) -> Figures:
    """Seconds of an offline step, and tokens of its ``sequences`` (their lengths) per second."""
    seconds = case.seconds(lambda: updated(step().metrics))
    return {"step s": seconds, "tokens/s": sum(sequences) / seconds, **case.peak()}


def sft_step(case: Case) -> Figures:
    model, _ = case.model()
    rows = demonstrations(case)
    config = sft.Config(batch_size=len(rows), epochs=1000, optim=Optim(learning_rate=1e-6))
    state = sft.State.create(model, len(rows), config, seed=0)
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    return timed(case, lambda: sft.step(state, rows, config=config), lengths)


def reward_step(case: Case) -> Figures:
    """Half as many pairs as there are completions elsewhere: each has two."""
    model, _ = case.model(kind=AutoModelForSequenceClassification)
    size = case.size
    pairs = [
        PreferencePair(
            prompt_ids=case.ids(size.prompt_tokens, i),
            chosen_ids=case.ids(size.new_tokens, i + 1),
            rejected_ids=case.ids(size.new_tokens, i + 2),
        )
        for i in range(size.completions // 2)
    ]
    config = reward_model.Config(batch_size=len(pairs), epochs=1000, optim=Optim(learning_rate=1e-6))
    state = reward_model.State.create(model, len(pairs), config, seed=0)
    lengths = [size.prompt_tokens + 2 * size.new_tokens] * len(pairs)
    return timed(case, lambda: reward_model.step(state, pairs, config=config), lengths)


def logprob_memory(case: Case) -> Figures:
    """The output head alone, forward and backward: in chunks, as in training, against all logits at once."""
    shape = SHAPES[case.shape]
    size = {"tokens": 8192 if case.device == "cuda" else 64, "width": shape.width, "vocabulary": shape.vocabulary}
    figures: Figures = {}
    for compute in (chunked, full):
        found = measure(compute, **size, device=case.device)
        figures |= {f"{compute.__name__} peak MiB": found["peak_mib"], f"{compute.__name__} s": found["seconds"]}
    return figures


def checkpoints(case: Case) -> Figures:
    """A checkpoint of weights, masters and AdamW's moments: how long training waits, and until it is on the disk."""
    model, tokenizer = case.model()
    rows = demonstrations(case)[:2]
    config = sft.Config(batch_size=len(rows), epochs=1000, optim=Optim(learning_rate=1e-6))
    state = sft.State.create(model, len(rows), config, seed=0)
    updated(sft.step(state, rows, config=config).metrics)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        kept = Checkpoints(Path(folder), tokenizer, Kept(last=1, best=None), overlap=case.device == "cuda")
        start = time.perf_counter()
        kept.save(RunState(state), RunPosition(step=1, sizes={}, config={}, seconds=0.0), within_step=False)
        waits = time.perf_counter() - start
        kept.wait()
        whole = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        kept.close()
    return {"training waits s": waits, "on disk after s": whole, "GiB": size / 2**30}


@torch.no_grad()
def precision(case: Case) -> Figures:
    """The largest difference between sampler and training pass, in float32; and whether a completion is the same alone
    as among others."""
    model, tokenizer = case.model(torch.float32)
    engine, prompts = Engine(model, tokenizer), case.prompts()
    sampling = Sampling(max_new_tokens=min(32, case.size.new_tokens))
    together = engine.generate(make_requests(prompts, group_size=2, seed=0), sampling=sampling)
    rows = [(group.prompt.ids, c.ids) for group in together for c in group.completions]
    (logp,) = completion_logprobs(model, Batch.collate(rows, torch.device(case.device)), temperature=1.0)
    drawn = torch.tensor([c.sampler_logp for group in together for c in group.completions])
    alone = engine.generate(make_requests(prompts, group_size=2, seed=0)[:1], sampling=sampling)
    same = [c.ids for c in alone[0].completions] == [c.ids for c in together[0].completions]
    return {"largest gap nats": float((logp.cpu() - drawn).abs().max()), "same alone": str(same)}


def tests(_: Case) -> Figures:
    """The tests marked gpu."""
    if skipped := lacks("pytest"):
        return skipped
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"},
    )
    print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return {"exit code": done.returncode, "said": done.stdout.strip().splitlines()[-1] if done.stdout else ""}


@dataclass(frozen=True)
class Part:
    run: Callable[[Case], Figures]
    shape: str
    limit: int
    """Seconds."""


PARTS: Mapping[str, Part] = {
    "hardware": Part(hardware, "0.5b", 60),
    "tests": Part(tests, "0.5b", 150),
    "precision": Part(precision, "0.5b", 60),
    "rollout-0.5b": Part(rollout(), "0.5b", 60),
    "grpo-0.5b": Part(online(grpo), "0.5b", 80),
    "grpo-0.5b-lora": Part(online(grpo, lora=True), "0.5b", 80),
    "ppo-0.5b": Part(online(ppo), "0.5b", 80),
    "sft-0.5b": Part(sft_step, "0.5b", 60),
    "reward-0.5b": Part(reward_step, "0.5b", 60),
    "rollout-1.5b": Part(rollout(), "1.5b", 70),
    "grpo-1.5b-lora": Part(online(grpo, lora=True, activations=True), "1.5b", 100),
    "grpo-1.5b": Part(online(grpo, activations=True), "1.5b", 100),
    "rollout-0.5b-eager": Part(rollout(graphs=False), "0.5b", 80),
    "rollout-0.5b-float32": Part(rollout(rounded=True), "0.5b", 60),
    "logprobs-0.5b": Part(logprob_memory, "0.5b", 60),
    "checkpoint-0.5b": Part(checkpoints, "0.5b", 90),
}
"""In the order in which they are run: what matters most comes first, as what does not fit is left out."""
