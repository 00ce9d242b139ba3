"""The memory that a run is expected to take, said when it begins, and at its end beside what it took."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tether.config import RunOptions
from tether.errors import ModelError
from tether.models.dry_run import Form
from tether.rewards.combine import WeightedSum
from tether.rewards.learned import LearnedReward
from tether.runtime.device import Dtype
from tether.runtime.memory import available_bytes
from tether.training.footprint import Footprint, dry_run
from tether.training.workload import WORKLOADS, Extent, Row
from tether.types import Demonstration, PreferencePair, Prompt
from tether.untrusted import one_line

GIB = 2**30
LATER = ("optimizer", "best weights")
"""What a run does not hold yet when it begins."""


def of_prompts(prompts: Iterable[Prompt]) -> list[Row]:
    return [(len(prompt.ids), []) for prompt in prompts]


def of_demonstrations(rows: Iterable[Demonstration]) -> list[Row]:
    return [(len(row.prompt_ids), [len(row.completion_ids)]) for row in rows]


def of_pairs(pairs: Iterable[PreferencePair]) -> list[Row]:
    return [(len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)]) for pair in pairs]


def extent_of(
    model: Any, run: RunOptions, rows: Sequence[Row], held_out: Sequence[Row] = (), *scorers: WeightedSum | None
) -> Extent:
    """The extent of a run that trains ``model``, which has the adapter that the options ask for already."""
    policy = Form.of(model)
    judges = [reward.model for one in scorers if one for reward, _ in one.rewards if isinstance(reward, LearnedReward)]
    return Extent(
        policy=replace(policy, adapter=None) if run.lora.lora_rank else policy,
        rows=rows,
        held_out=held_out,
        reward_models=[Form.of(judge) for judge in judges],
    )


def present(found: Footprint) -> int:
    """Bytes that a run holds when it begins."""
    return sum(size for name, size in found.held.items() if name not in LATER)


def tell(
    title: str, command: Any, extent: Extent, *, matmul_dtype: Dtype, device: torch.device, process: int
) -> float | None:
    """Say on the standard error what the run is expected to take, in a process that had ``process`` bytes before; gives
    the peak in GiB, or None where it is not known."""
    try:
        work = WORKLOADS[title](command, extent)
        found = dry_run(work, matmul_dtype=matmul_dtype, device=device, process=process)
    except ModelError as error:
        print(one_line(f"memory: {error}"), file=sys.stderr)
        return None
    print(one_line(sentence(found, title, available_bytes(device))), file=sys.stderr)
    return found.peak / GIB


def sentence(found: Footprint, title: str, available: int | None) -> str:
    """``memory: 1.9 GiB expected at the peak, in the update (weights 0.9, activations 0.3); 12.3 more are available``,
    or what to do where they are not enough; ``available`` is on top of the process and the models as they are."""
    parts: Mapping[str, int] = {"process": found.process, **found.held}
    phase = found.update if found.worst == "update" else {found.worst: found.phases[found.worst]}
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in {**parts, **phase}.items() if size >= 0.005 * GIB)
    said = f"memory: {found.peak / GIB:.2f} GiB expected at the peak, in the {found.worst} ({shown})"
    if available is None:
        return said
    missing = (
        found.peak - found.process - sum(size for name, size in found.held.items() if name not in LATER) - available
    )
    if missing <= 0:
        return said
    return f"{said}; {missing / GIB:.2f} more than there is: 'tether doctor --method {title}' says what to change"
