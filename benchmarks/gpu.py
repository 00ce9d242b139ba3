"""Everything for one card, in under nine minutes: the tests marked ``gpu``, then sampling, training steps, memory and
precision at Qwen2.5-0.5B's and 1.5B's shapes with random weights.

    python -m benchmarks.gpu [PART ...] [--list] [--out gpu.json] [--seconds 520]
    python -m benchmarks.gpu --device cpu --shape tiny      # the same code where there is no GPU

Each part is a process of its own with a time limit, so that one that hangs or fails costs the others nothing. It needs
no network and no pip: a machine without pytest skips the tests and says so. Writes ``gpu.json`` and prints rows for
docs/results.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.flops import SHAPES
from benchmarks.hardware import bandwidth, matrix_rate
from benchmarks.workload import config_of
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.generation.engine import Engine
from tether.models.adapters import Lora, add_adapter
from tether.models.loading import BASE, resolve
from tether.models.policy import completion_logprobs
from tether.models.reference import reference_of
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.types import Batch, Prompt, Sampling, make_requests

Figures = dict[str, float | str]


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

    def model(self, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Random weights, and a tokenizer without an end, so that all completions have the same length."""
        tokenizer = AutoTokenizer.from_pretrained(resolve(BASE), trust_remote_code=False)
        config = config_of(SHAPES[self.shape], tokenizer)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = None
        return model, tokenizer

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(ids=tuple(3 + (i + 7 * t) % 500 for t in range(self.size.prompt_tokens)), text="")
            for i in range(self.size.prompts)
        ]

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


def hardware(case: Case) -> Figures:
    return {
        "float32 Tflop/s": matrix_rate(case.device, torch.float32) / 1e12,
        "bfloat16 Tflop/s": matrix_rate(case.device, torch.bfloat16) / 1e12,
        "GB/s": bandwidth(case.device) / 1e9,
    }


def rollout(case: Case) -> Figures:
    model, tokenizer = case.model()
    engine = Engine(model, tokenizer)
    asked = make_requests(case.prompts(), group_size=case.size.group_size, seed=0)
    seconds = case.seconds(lambda: engine.generate(asked, sampling=case.sampling))
    return {"tokens/s": case.size.completions * case.size.new_tokens / seconds, "s": seconds, **case.peak()}


def sevens(completion_ids: list[list[int]]) -> list[float]:
    """A reward that varies and costs nothing."""
    return [sum(i % 7 == 0 for i in ids) / len(ids) for ids in completion_ids]


def training(algorithm: Any, *, lora: bool = False, activations: bool = False) -> Callable[[Case], Figures]:
    """A part that times a step of ``algorithm``."""

    def part(case: Case) -> Figures:
        model, tokenizer = case.model()
        if lora:
            add_adapter(model, Lora(lora_rank=16), seed=0)
        if activations:
            from tether.models.checkpointing import checkpoint_activations

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
            rows.append(algorithm.step(state, taken, generator=engine, scorer=score, config=config).metrics)

        seconds = case.seconds(step)
        last = rows[-1]
        return {
            "step s": seconds,
            "generate s": last["time/generate"],
            "update s": last["time/update"],
            "logprob gap": last["sampling/logprob_gap_mean"],
            **case.peak(),
        }

    return part


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
    return {"largest gap, nats": float((logp.cpu() - drawn).abs().max()), "same alone": str(same)}


def tests(_: Case) -> Figures:
    """The tests marked gpu."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "no pytest here"}
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
    "rollout-0.5b": Part(rollout, "0.5b", 60),
    "grpo-0.5b": Part(training(grpo), "0.5b", 80),
    "grpo-0.5b-lora": Part(training(grpo, lora=True), "0.5b", 80),
    "ppo-0.5b": Part(training(ppo), "0.5b", 80),
    "rollout-1.5b": Part(rollout, "1.5b", 70),
    "grpo-1.5b-lora": Part(training(grpo, lora=True, activations=True), "1.5b", 100),
    "grpo-1.5b": Part(training(grpo, activations=True), "1.5b", 100),
}
"""In the order in which they are run."""


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def isolated(name: str, args: argparse.Namespace, limit: float) -> Figures:
    """A part in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--device", args.device]
    line += ["--shape", args.shape] if args.shape else []
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; all unless given")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="in place of the shape of each part")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts; what does not fit is left out")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        part = PARTS[args.inside]
        case = Case(args.device, args.shape or part.shape, CARD if args.device == "cuda" else TOY)
        print(json.dumps(part.run(case)))
        return 0
    if args.list:
        print("\n".join(f"{name:16} at most {part.limit} s" for name, part in PARTS.items()))
        return 0
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; --list shows them")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shape tiny runs the same code")
    started, found = time.monotonic(), {"machine": machine(args.device), "parts": {}}
    print(f"{found['machine']}\n\n| part | figures | s |\n|---|---|---|", flush=True)
    for name in args.parts or PARTS:
        left, begun = args.seconds - (time.monotonic() - started), time.monotonic()
        figures: Figures = {"failed": "no time left"}
        if left > 15:
            figures = isolated(name, args, min(left, PARTS[name].limit))
        found["parts"][name] = figures
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        said = ", ".join(f"{key} {shown(value)}" for key, value in figures.items())
        print(f"| {name} | {said} | {time.monotonic() - begun:.0f} |", flush=True)
    return int(any("failed" in one or one.get("exit code", 0) for one in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
