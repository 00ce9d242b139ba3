"""``tether doctor``: what this machine has, and whether tether works on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tether import __version__
from tether.errors import ConfigError, ModelError
from tether.flags import REST, REST_FILES
from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models.loading import BASE, load_policy
from tether.runtime.device import WORTH_ROUNDING, matrix_rate, pick_device
from tether.runtime.memory import available_bytes, resident_bytes
from tether.trackers.names import NEEDED
from tether.training.fit import Change, Found, Plan, enough, extent_of_plan, flat, judged, smaller, step_seconds
from tether.training.workload import Extent
from tether.types import Prompt, Sampling, make_requests

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "hub": ("datasets",),
    "lora": ("peft",),
    "quantise": ("bitsandbytes", "accelerate"),
    "report": ("matplotlib",),
    "sentiment": ("vaderSentiment",),
    "serve": ("starlette", "uvicorn"),
    "math": ("math_verify",),
    "json": ("jsonschema",),
    "reasoning": ("reasoning_gym",),
    "notebook": ("ipykernel", "ipywidgets"),
    **NEEDED,
}
"""The modules that each extra installs for tether."""
GIB = 2**30
INDENT = 16
"""Columns of the names."""
READINGS, STEADY = 3, 0.7
"""Readings of the speed in float32, and the share of the best one from which the lowest counts as equal to it."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has and whether tether works on it; or with a method whether a run of it fits into memory,
    and how long its steps take."""

    method: Literal["sft", "reward", "dpo", "rejection-sampling", "ppo", "grpo"] | None = None
    """Training command to estimate; its own options follow. Of those that it needs only --model has to be given; with
    data, its longest rows count."""
    memory: float | None = None
    """GiB of memory of a GPU that the run is meant for. Unless given, the device of this machine that the options
    name."""
    prompt_tokens: int = 256
    """Tokens of a prompt, where no data is given."""
    completion_tokens: int = 256
    """Tokens of a completion or of a side of a pair, where no data is given; those that are sampled have
    max_new_tokens."""
    options: tuple[str, ...] = field(default=(), metadata={REST: True, REST_FILES: True})
    """Options of the method's command."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "memory must be positive": self.memory is None or self.memory > 0,
                "prompt_tokens must be at least 1": self.prompt_tokens >= 1,
                "completion_tokens must be at least 1": self.completion_tokens >= 1,
            },
        )
        if self.options and self.method is None:
            raise ConfigError(f"{self.options[0]} is an option of a run", hint="give its command too, as --method grpo")


def check_engine(device: torch.device) -> str:
    """Sample a few tokens with the engine and with the plain generator, its oracle."""
    model, tokenizer = load_policy(BASE, device=device)
    text = "The old man opened the door and"
    asked = make_requests([Prompt(ids=tuple(tokenizer(text)["input_ids"]), text=text)], group_size=2, seed=0)
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    found, expected = (
        [completion.ids for completion in kind(model, tokenizer).generate(asked, sampling=sampling)[0].completions]
        for kind in (Engine, NaiveGenerator)
    )
    if found == expected:
        return "works: it samples what generation without a cache samples"
    if device.type == "cpu":
        raise ModelError(
            "the rollout engine and generation without a cache sample different tokens on this machine",
            hint="please report it, with the lines above",
        )
    return "works: it differs from generation without a cache by rounding, as is usual on a GPU"


def main(command: Doctor) -> None:
    if command.method is None:
        examine()
        return
    plan = Plan(
        title=command.method,
        arguments=command.options,
        lengths=(command.prompt_tokens, command.completion_tokens),
        memory=None if command.memory is None else int(command.memory * GIB),
        process=resident_bytes(),
    )
    print("\n".join(account(plan)))


def examine() -> None:
    """Print what this machine has, and whether tether works on it."""
    device = pick_device("auto")
    rows = {
        "tether": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": describe(device),
        **speeds([matrix_rate(torch.float32, device) for _ in range(READINGS)], matrix_rate(torch.bfloat16, device)),
        "extras": extras({extra: all(map(importlib.util.find_spec, modules)) for extra, modules in EXTRAS.items()}),
        "rollout engine": check_engine(device),
    }
    for name, value in rows.items():
        print("\n".join(textwrap.wrap(f"{name:<{INDENT}}{value}", 80, subsequent_indent=" " * INDENT)))


def account(plan: Plan) -> Iterator[str]:
    """The lines of an estimate."""
    extent = extent_of_plan(plan)
    found = judged(plan, extent)
    device, footprint = plan.device_of(plan.options()), found.footprint
    yield from table(found)
    room, where = plan.memory, f"a GPU of {(plan.memory or 0) / GIB:g} GiB"
    if room is None:
        room, where = available_bytes(device), "here"
        if room is not None and device.type == "cpu":
            room += plan.process  # of which the run has one of its own
    if room is None:
        yield "this system does not say how much memory is available"
    elif footprint.peak <= room:
        yield f"fits {where}: {gib(footprint.peak)} of {gib(room)} GiB"
    else:
        yield f"does not fit {where}: {gib(footprint.peak)} of {gib(room)} GiB"
        yield from advice(plan, extent, room)
    if plan.memory is None:
        yield timing(step_seconds(found, device))


def table(found: Found) -> Iterator[str]:
    """What takes memory, part by part and phase by phase."""
    footprint, update = found.footprint, found.footprint.update
    yield f"{'GiB':>8}"
    for name, size in {"process": footprint.process, **footprint.held}.items():
        if size:
            yield f"{gib(size):>8}  {name}"
    for name, size in footprint.phases.items():
        parts = ""
        if name == "update":
            parts = f": {', '.join(f'{part} {gib(size)}' for part, size in update.items())}"
        yield f"{gib(size):>8}  in the {name}{parts}{' (the most)' if name == footprint.worst else ''}"
    yield f"{gib(footprint.peak):>8}  at the peak"


def advice(plan: Plan, extent: Extent, room: int) -> Iterator[str]:
    """What to change, from what does least harm on."""
    yield "to make it smaller, each on top of those before:"
    taken, peak = list[Change](), room + 1
    for change, peak in smaller(plan, extent, room):
        taken.append(change)
        yield f"{gib(peak):>8}  {' '.join(change)}"
    if peak > room:
        yield "that is not enough: take a smaller model, or shorter prompts and completions, or fewer at a time"
        return
    needed, peak = enough(plan, extent, room, taken)
    yield f"{gib(peak):>8}  with {' '.join(flat(needed))} alone, which is enough"


def timing(phases: Mapping[str, float]) -> str:
    """``a step takes 12 s or more (sampling 4, update 8), at the speed of matrix products alone``."""
    parts = ", ".join(f"{name} {value:.2g}" for name, value in phases.items())
    return f"a step takes {sum(phases.values()):.2g} s or more ({parts}), at the speed of matrix products alone"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def describe(device: torch.device) -> str:
    """The device that ``auto`` takes, and its memory."""
    if device.type == "cuda":
        free, total = (bytes_ / 2**30 for bytes_ in torch.cuda.mem_get_info(device))
        return f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"
    threads = torch.get_num_threads()
    found = f"CPU, {threads} thread{'s' * (threads > 1)} (OMP_NUM_THREADS sets another number)"
    if torch.version.cuda:
        found += f"; this torch is built for CUDA {torch.version.cuda} and finds no GPU: see what nvidia-smi says"
    return found


def speeds(full: Sequence[float], rounded: float) -> dict[str, str]:
    """What readings of :func:`matrix_rate` in float32, and one in bfloat16, say, in FLOP/s: a line for each dtype, and
    one more where those in float32 differ so much that something else uses the device."""
    best = max(full)
    times = rounded / best
    if times < 1:
        said = "not accelerated here: --matmul-dtype auto keeps float32"
    elif times < WORTH_ROUNDING:
        said = f"{in_flops(rounded)}, {times:.1f} times float32: too little, so --matmul-dtype auto keeps float32"
    else:
        said = f"{in_flops(rounded)}, {times:.1f} times float32: --matmul-dtype auto uses it"
    rows = {"float32": f"{in_flops(best)} in large matrix products", "bfloat16": said}
    if min(full) < STEADY * best:
        rows["load"] = (
            f"float32 readings vary from {in_flops(min(full))} to {in_flops(best)}, so other programs use this device; "
            "mfu compares a run with one reading at its start, and can then exceed 1"
        )
    return rows


def in_flops(rate: float) -> str:
    """``75 GFLOP/s``, ``1.2 TFLOP/s``."""
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"


def extras(installed: Mapping[str, bool]) -> str:
    """Which extras are installed, and how to install the others."""
    have, lack = ([name for name, here in installed.items() if here is wanted] for wanted in (True, False))
    parts = [f"{', '.join(have)} installed"] if have else []
    if lack:
        parts.append(f"{', '.join(lack)} missing: pip install 'tether-rlhf[{','.join(lack)}]'")
    return "; ".join(parts)
