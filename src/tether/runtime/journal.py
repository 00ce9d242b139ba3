"""What the steps since the last checkpoint have paid for: their rollouts and scores, on disk as soon as they are there.

A step that is done again, because the run was killed, gets them from here. A rollout is known by the step it belongs
to, its place among the step's rollouts and its seed, and is bit by bit what was sampled; scores lie beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tether.runtime.directory import RunDirectory
from tether.runtime.files import remove, whole, writing
from tether.types import (
    Completion,
    Finish,
    Generator,
    Metrics,
    Prompt,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Scorer,
)

WORTH_KEEPING = 60.0
"""Seconds of sampling from which a run's first step is kept, though it has no row yet: until then a run that fails
leaves no directory behind."""


class Journal:
    """The rollouts and scores of the steps that no checkpoint covers yet, under ``journal/`` of the run directory."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.path = directory.path / "journal"
        self.step, self.calls = 0, 0
        self.began = time.monotonic()
        self.held: list[Callable[[], None]] = []
        """What is not written down yet, because the run may still leave nothing behind."""

    def begin(self, step: int) -> None:
        """What is generated and scored from now on belongs to ``step``."""
        self.step, self.calls, self.began = step, 0, time.monotonic()
        self.held = []

    def file(self, kind: str) -> Path:
        """Where the rollouts or the scores of the present call lie."""
        return self.path / f"step_{self.step:06d}.{self.calls:02d}.{kind}"

    def keep(self, write: Callable[[], None]) -> None:
        """Write something down: now, or where the run has not made its directory, once it is worth that."""
        self.held.append(write)
        if self.directory.made or time.monotonic() - self.began > WORTH_KEEPING:
            self.write()

    def write(self) -> None:
        """Write down what is held."""
        self.directory.make()
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        for write in self.held:
            write()
        self.held = []

    def files(self, *, after: int) -> list[Path]:
        """The files of the steps after ``after``."""
        return [file for step, file in self._steps() if step > after]

    def forget(self, *, up_to: int) -> None:
        """Remove the files of the steps up to ``up_to``, and what a killed process left behind."""
        with writing(self.path):
            for file in [file for step, file in self._steps() if step <= up_to] + list(self.path.glob(".*")):
                remove(file)

    def remove(self) -> None:
        """The run is finished: nothing is done again."""
        with writing(self.path):
            remove(self.path)

    def _steps(self) -> Iterator[tuple[int, Path]]:
        for file in sorted(self.path.glob("step_*")):
            if match := re.fullmatch(r"step_(\d+)\.\d+\.(rollouts|scores)", file.name):
                yield int(match[1]), file


class PaidGenerator:
    """A :class:`tether.types.Generator` that asks another one only for what the journal does not hold."""

    def __init__(self, generate: Generator, journal: Journal) -> None:
        self.inner, self.journal = generate, journal
        self.of_last_call: Metrics = {}

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed: int
    ) -> list[RolloutGroup]:
        self.journal.calls += 1
        asked = request(prompts, group_size, sampling, seed)
        found = read_rollouts(self.journal.file("rollouts"), prompts, asked)
        if found is not None:
            groups, self.of_last_call = found
            return groups
        groups = self.inner.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
        self.of_last_call = self.inner.figures()
        self.journal.keep(partial(write_rollouts, self.journal.file("rollouts"), groups, asked, self.of_last_call))
        return groups

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.inner.load_weights(version, weights)

    def figures(self) -> Metrics:
        return self.of_last_call


class PaidScorer:
    """A :class:`tether.types.Scorer` that asks another one only for what the journal does not hold."""

    def __init__(self, score: Scorer, journal: Journal) -> None:
        self.inner, self.journal = score, journal

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        file, asked = self.journal.file("scores"), completions_digest(groups)
        found = read_scores(file, groups, asked)
        if found is not None:
            return found
        scored = self.inner.score(groups)
        self.journal.keep(partial(write_scores, file, scored, asked))
        return scored


def request(prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int) -> str:
    """What makes a rollout the same: a digest of all that was asked for."""
    return digest([[list(prompt.ids) for prompt in prompts], group_size, repr(sampling), seed])


def completions_digest(groups: Sequence[RolloutGroup]) -> str:
    return digest([[list(completion.ids) for completion in group.completions] for group in groups])


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def write_rollouts(file: Path, groups: Sequence[RolloutGroup], asked: str, figures: Metrics) -> None:
    """Ids, log-probs and lengths as tensors; the rest as JSON beside them."""
    completions = [completion for group in groups for completion in group.completions]
    rest = {
        "asked": asked,
        "figures": figures,
        "sizes": [len(group.completions) for group in groups],
        "versions": [group.weights_version for group in groups],
        "finish": [completion.finish.value for completion in completions],
        "text": [completion.text for completion in completions],
    }
    tensors = {
        "ids": torch.tensor([i for completion in completions for i in completion.ids], dtype=torch.int64),
        "logprobs": torch.tensor([p for completion in completions for p in completion.logprobs], dtype=torch.float64),
        "lengths": torch.tensor([len(completion.ids) for completion in completions], dtype=torch.int64),
    }
    with whole(file) as unfinished:
        save_file(tensors, unfinished, metadata={"rollouts": json.dumps(rest)})


def read_rollouts(file: Path, prompts: Sequence[Prompt], asked: str) -> tuple[list[RolloutGroup], Metrics] | None:
    """The groups and the generator's figures; None where the file is not there, not whole or not what was asked for:
    it is then sampled again."""
    try:
        with safe_open(file, framework="pt") as saved:
            rest = json.loads(saved.metadata()["rollouts"])
            ids, logprobs, lengths = (saved.get_tensor(name) for name in ("ids", "logprobs", "lengths"))
    except (OSError, SafetensorError):
        return None
    if rest["asked"] != asked:
        return None
    sizes = lengths.tolist()
    completions = iter(
        [
            Completion(ids=tuple(i), logprobs=tuple(p), finish=Finish(finish), text=text)
            for i, p, finish, text in zip(
                (part.tolist() for part in ids.split(sizes)),
                (part.tolist() for part in logprobs.split(sizes)),
                rest["finish"],
                rest["text"],
                strict=True,
            )
        ]
    )
    groups = [
        RolloutGroup(prompt=prompt, completions=tuple(next(completions) for _ in range(size)), weights_version=version)
        for prompt, size, version in zip(prompts, rest["sizes"], rest["versions"], strict=True)
    ]
    return groups, rest["figures"]


def write_scores(file: Path, groups: Sequence[ScoredGroup], asked: str) -> None:
    """Scores as JSON, whose numbers are read back as they were."""
    scores = [[[one.total, dict(one.parts), one.token_rewards] for one in group.scores] for group in groups]
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps({"asked": asked, "scores": scores}), encoding="utf-8")


def read_scores(file: Path, groups: Sequence[RolloutGroup], asked: str) -> list[ScoredGroup] | None:
    """The groups with their scores; None as for rollouts."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if saved["asked"] != asked:
        return None
    return [
        ScoredGroup(
            rollouts=group,
            scores=tuple(
                Score(total=total, parts=parts, token_rewards=None if tokens is None else tuple(tokens))
                for total, parts, tokens in scores
            ),
        )
        for group, scores in zip(groups, saved["scores"], strict=True)
    ]
