"""Checkpoints: written aside, summed up, named last, and trusted only where the sums are right.

    checkpoints/step_000020/      after step 20
    checkpoints/step_000020.01/   within step 21
        model/ tensors.safetensors state.json    the state (:mod:`tether.runtime.state`)
        manifest.json                            size and SHA-256 of each file, and where the run was

A directory has its name only once all of it is on the disk, and older ones are removed only then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.errors import RunError
from tether.models.loading import save_tokenizer
from tether.runtime.files import remove, whole, writing
from tether.runtime.state import MODEL, Snapshot
from tether.types import Metrics

MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{6,})(?:\.(\d{2,}))?")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run was when a checkpoint was made."""

    step: int
    """The last step whose row is in ``metrics.jsonl``."""
    sizes: dict[str, int]
    """Bytes of the files that grow with the run."""
    config: dict[str, Any]
    """The configuration that it ran with."""
    seconds: float
    """How long the run had taken."""
    metrics: Metrics = field(default_factory=dict)
    """The row of that step."""
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files outside the checkpoint that it cannot go on without, as the manifest lists its own."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One whose files are all there and as they were written."""

    path: Path
    place: Place


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which checkpoints are kept."""

    last: int
    """How many of the newest."""
    best: str | None
    """And the one with the highest value of this metric, or with a minus before it the lowest."""


class Checkpoints:
    """The checkpoints of a run. The run goes on while one gets to the disk; with ``overlap``, while it is written too.

    That is for CUDA. Training on a CPU uses all its cores, and slows down by more than the writer's share where one
    thread of a product has to wait for its core.
    """

    def __init__(self, run: Path, tokenizer: PreTrainedTokenizerBase, kept: Kept, *, overlap: bool = False) -> None:
        self.run, self.tokenizer, self.kept, self.overlap = run, tokenizer, kept, overlap
        self.directory = run / "checkpoints"
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None
        self.tokenizer_files: dict[str, bytes] = {}

    def save(self, state: Any, place: Place, *, within_step: bool) -> None:
        """Begin to write a checkpoint; the state may change once this returns."""
        self.wait()
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
            if not self.tokenizer_files:
                self.tokenizer_files = self._files_of_tokenizer()
        name, snapshot = self._name(place.step, within_step), Snapshot.of(state, copy=self.overlap)
        if self.overlap:
            self.under_way = self.writer.submit(lambda: self._keep(self._written(snapshot, place, name)))
        else:
            self.under_way = self.writer.submit(self._keep, self._written(snapshot, place, name))

    def wait(self) -> None:
        """Return once what is under way is on the disk; raises what went wrong there."""
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.result()

    def _files_of_tokenizer(self) -> dict[str, bytes]:
        """Its files, asked for once: a tokenizer must not be used in two threads at a time."""
        with tempfile.TemporaryDirectory(prefix=".tokenizer", dir=self.directory) as scratch:
            save_tokenizer(self.tokenizer, Path(scratch))
            return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}

    def _name(self, step: int, within_step: bool) -> str:
        if not within_step:
            return f"step_{step:06d}"
        taken = [part for number, part, _ in self.names() if number == step]
        return f"step_{step:06d}.{max(taken, default=0) + 1:02d}"

    def _written(self, snapshot: Snapshot, place: Place, name: str) -> contextlib.ExitStack:
        """All files of a checkpoint. Closing the stack waits for the disk, and gives it its name."""
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(whole(self.directory / name, durable=True))
            partial.mkdir()
            snapshot.write(partial)
            for file, content in self.tokenizer_files.items():
                (partial / MODEL / file).write_bytes(content)
            files = {
                str(path.relative_to(partial)): summed(path) for path in sorted(partial.rglob("*")) if path.is_file()
            }
            manifest = {**asdict(place), "files": files}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            return stack.pop_all()

    def _keep(self, written: contextlib.ExitStack) -> None:
        written.close()
        with writing(self.directory):
            self._prune()

    def names(self) -> list[tuple[int, int, Path]]:
        """``(step, part, path)`` of what has a checkpoint's name, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [(match, path) for path in self.directory.iterdir() if (match := NAME.fullmatch(path.name))]
        return sorted((int(match[1]), int(match[2] or 0), path) for match, path in found)

    def _prune(self) -> None:
        """Remove all but those to be kept, and what a killed process left behind."""
        paths = [path for *_, path in self.names()]
        kept = set(paths[-self.kept.last :]) | {best for best in [self._best(paths)] if best}
        for path in self.directory.iterdir():
            if path.name.startswith("."):
                remove(path)
            elif path in paths and path not in kept:
                discard(path)

    def _best(self, paths: list[Path]) -> Path | None:
        if self.kept.best is None:
            return None
        metric, sign = self.kept.best.removeprefix("-"), -1.0 if self.kept.best.startswith("-") else 1.0
        values = {}
        for path in paths:
            with contextlib.suppress(RunError):  # one that cannot be read is no best one
                metrics = read_manifest(path)["metrics"]
                if metric in metrics:
                    values[path] = sign * metrics[metric]
        return max(values, key=lambda path: values[path]) if values else None

    def oldest_step(self) -> int:
        """The step of the oldest checkpoint; 0 where there is none."""
        return next((step for step, *_ in self.names()), 0)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written, and what is wrong with those passed over for it."""
        wrong: list[str] = []
        for *_, path in reversed(self.names()):
            try:
                return self.verified(path), wrong
            except RunError as error:
                wrong.append(str(error))
        return None, wrong

    def forget_after(self, checkpoint: Checkpoint | None) -> None:
        """Remove what was passed over for ``checkpoint``, so that the run's next ones have its place."""
        paths = [path for *_, path in self.names()]
        with writing(self.directory):
            for path in paths[paths.index(checkpoint.path) + 1 if checkpoint else 0 :]:
                discard(path)
            if self.directory.is_dir():
                self._prune()  # the process may have been killed before it did

    def accept(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        """From now on ``checkpoint`` is as good with this configuration."""
        manifest = read_manifest(checkpoint.path) | {"config": dict(config)}
        with whole(checkpoint.path / MANIFEST, durable=True) as partial:
            partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def finish(self) -> None:
        """Remove those of unfinished steps, which nothing goes on from once the run is finished."""
        with writing(self.directory):
            for _, part, path in self.names()[:-1]:
                if part:
                    discard(path)

    def verified(self, path: Path) -> Checkpoint:
        """Read every byte; raise :class:`RunError` where one is missing or another."""
        manifest = read_manifest(path)
        for base, files in ((path, manifest.pop("files")), (self.run, manifest["needs"])):
            for name, expected in files.items():
                file = base / name
                if not file.is_file():
                    raise RunError(f"{path}: corrupt: {name} is missing")
                if summed(file) != expected:
                    raise RunError(f"{path}: corrupt: {name} is not as it was written")
        return Checkpoint(path=path, place=Place(**manifest))

    def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        try:
            self.wait()
        finally:
            self.writer.shutdown()


def discard(path: Path) -> None:
    """Remove a checkpoint; half of one never has a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.removed")
    remove(doomed)
    path.rename(doomed)
    remove(doomed)


def summed(file: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, or a :class:`RunError` that says why there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: corrupt: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError:
        raise RunError(f"{path}: corrupt: {MANIFEST} is not valid JSON") from None
    expected = {*Place.__dataclass_fields__, "files"}
    if not isinstance(manifest, dict) or manifest.keys() != expected:
        raise RunError(f"{path}: corrupt: {MANIFEST} does not hold {', '.join(sorted(expected))}")
    return manifest
