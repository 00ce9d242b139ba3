"""``tether doctor``: what this machine has, and whether tether works on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tether import __version__
from tether.errors import ModelError
from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models.loading import BASE, load_policy
from tether.runtime.device import WORTH_ROUNDING, matrix_rate, pick_device
from tether.trackers.names import NEEDED
from tether.types import Prompt, Sampling, make_requests

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "hub": ("datasets",),
    "lora": ("peft",),
    "quantise": ("bitsandbytes", "accelerate"),
    "report": ("matplotlib",),
    "sentiment": ("vaderSentiment",),
    "notebook": ("ipykernel", "ipywidgets"),
    **NEEDED,
}
"""The modules that each extra installs for tether."""
INDENT = 16
"""Columns of the names."""
READINGS, STEADY = 3, 0.7
"""Readings of the speed in float32, and the share of the best one from which the lowest counts as equal to it."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has, and whether tether works on it."""


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


def main(_: Doctor) -> None:
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
