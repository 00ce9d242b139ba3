"""Two run directories, compared bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load as load_tensors

from commandline import contents
from tether.runtime.changes import CONTENT_DECIDES, REWARDS, placeless
from tether.runtime.recorder import TIMINGS


def difference(run: Path, other: Path) -> str | None:
    """The first difference between two finished runs, or None where they are equal.

    Compared are weights, every row of metrics, every completion, summaries, configurations, how many checkpoints
    there are and what is in the newest, and that neither has a file that the other has not. Durations, the runs' own
    paths and the directories of their inputs may differ.
    """
    ours, theirs = kept(run), kept(other)
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"{name} is only in {run if name in ours else other}"
    for name in sorted(ours, key=lambda name: (name != "metrics.jsonl", name)):
        found, expected = ({} if ours[name] == theirs[name] else parts(name, data[name]) for data in (ours, theirs))
        for place in [*expected, *found]:
            if found.get(place) != expected.get(place):
                return f"{name}, {place}: {str(found.get(place))[:80]}, not {str(expected.get(place))[:80]}"
    return None


def kept(run: Path) -> dict[str, bytes]:
    """The files of a run. Of its checkpoints, if it has any, their number and the newest: a signal makes others. The
    manifest of a checkpoint has the sizes of files with durations in them, and is left out."""
    saved = sorted((run / "checkpoints").glob("*"))
    newest = contents(saved[-1]) if saved else {}
    last = {f"checkpoints/newest/{name}": data for name, data in newest.items() if name != "manifest.json"}
    rest = {name: data for name, data in contents(run).items() if not name.startswith("checkpoints/")}
    return rest | last | {"checkpoints": str(len(saved)).encode()}


def parts(name: str, data: bytes) -> dict[str, object]:
    """The values in a file, by place, so that equal means bitwise equal; without durations and the run's own path."""
    match Path(name).suffix:
        case ".safetensors":
            tensors = load_tensors(data).items()
            return {key: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for key, t in tensors}
        case ".jsonl":
            rows = enumerate(map(json.loads, data.splitlines()), 1)
            return {f"row {number}, {key}": value for number, row in rows for key, value in leaves(row)}
        case ".json" | ".yaml":
            return dict(leaves(without_places(yaml.safe_load(data))))  # JSON is YAML too
        case _:
            return {"its bytes": data}


def without_places(value: object) -> object:
    """A configuration with the names of its inputs in place of their paths; anything else as it is."""
    if not isinstance(value, dict):
        return value
    named = {name: Path(value[name]).name for name in CONTENT_DECIDES & value.keys() if isinstance(value[name], str)}
    placed = {name: value[name] for name in REWARDS if isinstance(value.get(name), list)}
    rewards = {name: [str(placeless(reward)) for reward in given] for name, given in placed.items()}
    return {**value, **named, **rewards}


def leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """The plain values inside ``value``, written out in full, by their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith((*TIMINGS, "seconds")) and (place, key) != ("", "out"):
                yield from leaves(inner, f"{place}/{key}".lstrip("/"))
    else:
        yield place, json.dumps(value)
