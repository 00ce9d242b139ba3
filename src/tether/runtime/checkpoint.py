"""Checkpoints: written under a temporary name, renamed last, and trusted only where every checksum is right.

    checkpoints/step_000020/      after step 20
    checkpoints/step_000020.01/   within step 21
        model/ tensors.safetensors state.json    the state (:mod:`tether.runtime.state`)
        manifest.json                            size and SHA-256 of each file, and the run's position

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
from tether.models.saving import save_tokenizer
from tether.names import metric_and_sign
from tether.runtime.files import atomic_write, remove, writing
from tether.runtime.json_text import to_json
from tether.runtime.state import MODEL, RunState, Snapshot
from tether.types import Metrics

DIRECTORY, MANIFEST = "checkpoints", "manifest.json"
NAME = re.compile(r"step_(\d{6,})(?:\.(\d{2,}))?")


@dataclass(frozen=True, kw_only=True)
class RunPosition:
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
    ended: str = ""
    """Why the run ended before its last step; empty if it did not."""
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files outside the checkpoint that resuming needs, as the manifest lists its own."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are all there and as they were written."""

    path: Path
    position: RunPosition


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which checkpoints are kept."""

    last: int
    """How many of the newest: of those after a step, and of those within the step that follows."""
    best: str | None
    """The one after the step with the highest value of this metric too, or with a minus before the name the lowest; the
    earliest of equals."""

    def value(self, metrics: Metrics) -> float | None:
        """How good a step with these metrics is by :attr:`best`, higher being better; None where they lack it."""
        if self.best is None:
            return None
        metric, sign = metric_and_sign(self.best)
        return sign * metrics[metric] if metric in metrics else None


class Checkpoints:
    """The checkpoints of a run. Training continues while one reaches the disk; with ``overlap``, while it is written
    too.

    Overlap is for CUDA. Training on a CPU uses all its cores, and a writer that takes one of them slows every matrix
    product down.
    """

    def __init__(self, run: Path, tokenizer: PreTrainedTokenizerBase, kept: Kept, *, overlap: bool = False) -> None:
        self.run, self.tokenizer, self.kept, self.overlap = run, tokenizer, kept, overlap
        self.directory = run / DIRECTORY
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None
        self.tokenizer_files: dict[str, bytes] = {}

    def save(self, state: RunState, position: RunPosition, *, within_step: bool) -> None:
        """Begin to write a checkpoint; the state may change once this returns."""
        self.wait()
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
            if not self.tokenizer_files:
                self.tokenizer_files = self._files_of_tokenizer()
        name, snapshot = self._name(position.step, within_step), Snapshot.of(state, copy=self.overlap)
        if self.overlap:
            self.under_way = self.writer.submit(lambda: self._keep(self._written(snapshot, position, name)))
        else:
            self.under_way = self.writer.submit(self._keep, self._written(snapshot, position, name))

    def wait(self) -> None:
        """Return once the checkpoint being written is on the disk; raises what went wrong there."""
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.result()

    def _files_of_tokenizer(self) -> dict[str, bytes]:
        """Its files by path, read once: a tokenizer must not be used in two threads at a time. One with several chat
        templates has a directory of them."""
        with tempfile.TemporaryDirectory(prefix=".tokenizer", dir=self.directory) as scratch:
            save_tokenizer(self.tokenizer, Path(scratch))
            files = [path for path in Path(scratch).rglob("*") if path.is_file()]
            return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in files}

    def _name(self, step: int, within_step: bool) -> str:
        if not within_step:
            return f"step_{step:06d}"
        taken = [part for number, part, _ in self.names() if number == step]
        return f"step_{step:06d}.{max(taken, default=0) + 1:02d}"

    def _written(self, snapshot: Snapshot, position: RunPosition, name: str) -> contextlib.ExitStack:
        """All files of a checkpoint. Closing the stack waits for the disk, then renames the directory."""
        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(atomic_write(self.directory / name, durable=True))
            partial.mkdir()
            snapshot.write(partial)
            for file, content in self.tokenizer_files.items():
                (partial / MODEL / file).parent.mkdir(exist_ok=True)
                (partial / MODEL / file).write_bytes(content)
            files = {
                str(path.relative_to(partial)): summed(path) for path in sorted(partial.rglob("*")) if path.is_file()
            }
            manifest = {**asdict(position), "files": files}
            (partial / MANIFEST).write_text(to_json(manifest, indent=1), encoding="utf-8")
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
        named = self.names()
        paths = [path for *_, path in named]
        after_steps = [path for _, part, path in named if not part]
        within = paths[paths.index(after_steps[-1]) + 1 :] if after_steps else paths
        # counted apart: a run that was interrupted keeps after its end what one that was not keeps
        kept = {*after_steps[-self.kept.last :], *within[-self.kept.last :]}
        kept |= {path for _, path in self.ranked()[:1]}
        for path in self.directory.iterdir():
            if path.name.startswith("."):
                remove(path)
            elif path in paths and path not in kept:
                discard(path)

    def ranked(self) -> list[tuple[float, Path]]:
        """The checkpoints after a step whose row has the metric, best first, each with its :meth:`Kept.value`."""
        found = []
        for _, part, path in self.names():
            with contextlib.suppress(RunError):  # one that cannot be read is not the best
                if not part and (value := self.kept.value(read_manifest(path)["metrics"])) is not None:
                    found.append((value, path))
        return sorted(found, key=lambda one: -one[0])

    def would_be_best(self, metrics: Metrics) -> bool:
        """Whether a checkpoint after a step with these metrics would be the best one."""
        self.wait()
        value, ranked = self.kept.value(metrics), self.ranked()
        return value is not None and (not ranked or value > ranked[0][0])

    def best(self) -> tuple[Checkpoint | None, list[str]]:
        """The best checkpoint that is as it was written, and what is wrong with better ones."""
        wrong: list[str] = []
        for _, path in self.ranked():
            try:
                return self.verified(path), wrong
            except RunError as error:
                wrong.append(f"{error}; it is passed over")
        return None, wrong

    def oldest_step(self) -> int:
        """The step of the oldest checkpoint; 0 where there is none."""
        return next((step for step, *_ in self.names()), 0)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written, and what is wrong with newer ones."""
        wrong: list[str] = []
        for *_, path in reversed(self.names()):
            try:
                return self.verified(path), wrong
            except RunError as error:
                wrong.append(str(error))
        return None, wrong

    def forget_after(self, checkpoint: Checkpoint | None) -> None:
        """Remove all checkpoints after ``checkpoint``, so that the run's next ones can take their names."""
        paths = [path for *_, path in self.names()]
        with writing(self.directory):
            for path in paths[paths.index(checkpoint.path) + 1 if checkpoint else 0 :]:
                discard(path)
            if self.directory.is_dir():
                self._prune()  # a killed process may not have done so

    def accept(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        """Record that ``checkpoint`` may be resumed with this configuration."""
        manifest = read_manifest(checkpoint.path) | {"config": dict(config)}
        with atomic_write(checkpoint.path / MANIFEST, durable=True) as partial:
            partial.write_text(to_json(manifest, indent=1), encoding="utf-8")

    def finish(self) -> None:
        """Remove those within a step, which nothing resumes once the run is finished."""
        with writing(self.directory):
            for _, part, path in self.names():
                if part:
                    discard(path)

    def verified(self, path: Path) -> Checkpoint:
        """Read every byte; raise :class:`RunError` where a file is missing or differs."""
        manifest = read_manifest(path)
        for base, files in ((path, manifest.pop("files")), (self.run, manifest["needs"])):
            for name, expected in files.items():
                file = base / name
                if not file.is_file():
                    raise RunError(f"corrupt: {name} is missing", where=path)
                if summed(file) != expected:
                    raise RunError(f"corrupt: {name} is not as it was written", where=path)
        return Checkpoint(path=path, position=RunPosition(**manifest))

    def close(self) -> None:
        """Wait for the checkpoint being written, and end the thread."""
        try:
            self.wait()
        finally:
            self.writer.shutdown()


def remove_checkpoints(run: Path) -> None:
    """Remove all checkpoints of a finished run."""
    directory = run / DIRECTORY
    with writing(directory):
        remove(directory)


def discard(path: Path) -> None:
    """Remove a checkpoint, renaming it first: a directory with a checkpoint's name is always complete."""
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
        raise RunError(f"corrupt: {MANIFEST} cannot be read ({error.strerror})", where=path) from None
    except ValueError:
        raise RunError(f"corrupt: {MANIFEST} is not valid JSON", where=path) from None
    expected = {*RunPosition.__dataclass_fields__, "files"}
    if not isinstance(manifest, dict) or manifest.keys() != expected:
        raise RunError(f"corrupt: {MANIFEST} does not hold {', '.join(sorted(expected))}", where=path)
    return manifest
