"""``tether doctor``: what this machine has, and whether tether works on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from tether import __version__
from tether.errors import ModelError
from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models.loading import BASE, load_policy
from tether.runtime.device import matrix_rate, pick_device
from tether.types import Prompt, Sampling, make_requests

EXTRAS = {"hub": "datasets", "report": "matplotlib", "sentiment": "vaderSentiment"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has, and whether tether works on it."""


def check_engine(device: torch.device) -> str:
    """Sample a few tokens with the engine and with the oracle."""
    model, tokenizer = load_policy(BASE, device=device)
    text = "The old man opened the door and"
    asked = make_requests([Prompt(ids=tuple(tokenizer(text)["input_ids"]), text=text)], group_size=2, seed=0)
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    found, expected = (
        [completion.ids for completion in kind(model, tokenizer).generate(asked, sampling=sampling)[0].completions]
        for kind in (Engine, NaiveGenerator)
    )
    if found != expected and device.type == "cpu":
        raise ModelError("the rollout engine and the plain oracle disagree on this machine", hint="please report it")
    return "agrees with the oracle" if found == expected else "differs from the oracle by rounding"


def main(_: Doctor) -> None:
    device = pick_device("auto")
    rows = {
        "tether": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "float32": f"{matrix_rate(torch.float32, device) / 1e9:,.0f} GFLOP/s",
        "bfloat16": f"{matrix_rate(torch.bfloat16, device) / 1e9:,.0f} GFLOP/s",
        "extras": ", ".join(
            f"{extra} {'yes' if importlib.util.find_spec(module) else 'no'}" for extra, module in EXTRAS.items()
        ),
        "rollout engine": check_engine(device),
    }
    for name, value in rows.items():
        print(f"{name:<16}{value}")
