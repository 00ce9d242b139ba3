"""The rollouts and scores of the steps since the last checkpoint, on disk as soon as they are there.

A step that is repeated, because the run was killed, reads them from here. A rollout is found by the number of its
step, its number among the step's rollouts and a digest of what was asked for; it is bit by bit what was sampled. Its
scores lie beside it.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tether.digests import completions_digest, digest
from tether.runtime.directory import RunDirectory
from tether.runtime.files import atomic_write, remove, writing
from tether.types import (
    Completion,
    FinishReason,
    Generator,
    Metrics,
    Request,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Scorer,
    Turn,
)

WORTH_KEEPING = 60.0
"""Seconds after which a run's first step is written down before its row is; until then a run that fails leaves no
directory behind."""


class Journal:
    """The rollouts and scores of the steps that no checkpoint covers yet, under ``journal/`` of the run directory."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.path = directory.path / "journal"
        self.step, self.calls = 0, 0
        self.began = time.monotonic()
        self.held: list[Callable[[], None]] = []
        """What is not written yet, because the run may still fail and leave nothing behind."""
        self.of_run: list[Callable[[], None]] = []
        """The same for what belongs to the run rather than to its step."""

    def begin(self, step: int) -> None:
        """What is generated and scored after this call belongs to ``step``."""
        self.step, self.calls, self.began = step, 0, time.monotonic()
        self.held = []
        if self.of_run and self.directory.made:
            self.write()

    def file(self, kind: str) -> Path:
        """The path of the rollouts or the scores of the current call."""
        return self.path / f"step_{self.step:06d}.{self.calls:02d}.{kind}"

    def keep(self, write: Callable[[], None]) -> None:
        """Write now, or where the run has not made its directory yet, once there is enough to lose."""
        self.held.append(write)
        if self.directory.made or time.monotonic() - self.began > WORTH_KEEPING:
            self.write()

    def keep_for_run(self, write: Callable[[], None]) -> None:
        """Write now, or where the run has not made its directory yet, once it does."""
        self.of_run.append(write)
        if self.directory.made:
            self.write()

    def write(self) -> None:
        """Write what is held."""
        self.directory.make()
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
        for write in [*self.of_run, *self.held]:
            write()
        self.of_run, self.held = [], []

    def scored(self, scorer: Scorer, groups: Sequence[RolloutGroup], *, by: str = "") -> list[ScoredGroup]:
        """``scorer.score(groups)``, or the scores that a repeated step had for the completions of its current call;
        ``by`` says what the scorer is made of, where that may change."""
        return self._scored(self.file("scores"), self.keep, scorer, groups, by)

    def scored_once(self, name: str, scorer: Scorer, groups: Sequence[RolloutGroup], *, by: str) -> list[ScoredGroup]:
        """``scorer.score(groups)``, or the scores that the run has had for these completions, in the file ``name``."""
        return self._scored(self.path / name, self.keep_for_run, scorer, groups, by)

    def _scored(
        self,
        file: Path,
        keep: Callable[[Callable[[], None]], None],
        scorer: Scorer,
        groups: Sequence[RolloutGroup],
        by: str,
    ) -> list[ScoredGroup]:
        """The scores in ``file`` if they are those of ``groups``, else new ones, which are to be kept there."""
        asked = completions_digest(groups) + by
        found = read_scores(file, groups, asked)
        if found is not None:
            return found
        scored = scorer.score(groups)
        if any(score.total is not None for group in scored for score in group.scores):  # else the step may end here
            keep(partial(write_scores, file, scored, asked))
        return scored

    def files(self, *, after: int) -> list[Path]:
        """The files of the steps after ``after``."""
        return [file for step, file in self._steps() if step > after]

    def forget(self, *, up_to: int) -> None:
        """Remove the files of the steps up to ``up_to``, and unfinished files of a process that was killed."""
        with writing(self.path):
            for file in [file for step, file in self._steps() if step <= up_to] + list(self.path.glob(".*")):
                remove(file)

    def remove(self) -> None:
        """Remove all of it, once the run is finished and no step can be repeated."""
        with writing(self.path):
            remove(self.path)

    def _steps(self) -> Iterator[tuple[int, Path]]:
        for file in sorted(self.path.glob("step_*")):
            if match := re.fullmatch(r"step_(\d+)\.\d+\.(rollouts|scores)", file.name):
                yield int(match[1]), file


class JournaledGenerator:
    """A :class:`tether.types.Generator` that asks another one only for what the journal does not hold."""

    def __init__(self, generator: Generator, journal: Journal) -> None:
        self.inner, self.journal = generator, journal
        self.of_last_call: Metrics = {}

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        self.journal.calls += 1
        file, asked = self.journal.file("rollouts"), requests_digest(requests, sampling)
        found = read_rollouts(file, requests, asked)
        if found is not None:
            groups, self.of_last_call = found
            return groups
        groups = self.inner.generate(requests, sampling=sampling)
        self.of_last_call = self.inner.figures()
        self.journal.keep(partial(write_rollouts, file, groups, asked, self.of_last_call))
        return groups

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.inner.load_weights(version, weights)

    def figures(self) -> Metrics:
        return self.of_last_call


class JournaledScorer:
    """A :class:`tether.types.Scorer` that asks another one only for what the journal does not hold."""

    def __init__(self, scorer: Scorer, journal: Journal) -> None:
        self.inner, self.journal = scorer, journal

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        return self.journal.scored(self.inner, groups)


def requests_digest(requests: Sequence[Request], sampling: Sampling) -> str:
    """A digest of all that decides a rollout, but for the weights."""
    return digest([[[list(request.prompt.ids), list(request.seeds)] for request in requests], repr(sampling)])


def write_rollouts(file: Path, groups: Sequence[RolloutGroup], asked: str, figures: Metrics) -> None:
    """Ids, masks, log-probs and lengths as tensors, all completions one behind the other; the rest as JSON."""
    completions = [completion for group in groups for completion in group.completions]
    rest = {
        "asked": asked,
        "figures": figures,
        "sizes": [len(group.completions) for group in groups],
        "finish_reasons": [completion.finish_reason.value for completion in completions],
        "texts": [completion.text for completion in completions],
        "weights_versions": [completion.weights_version for completion in completions],
    }
    if any(completion.turns for completion in completions):
        rest["prompts"] = [[list(group.prompt.ids), group.prompt.text, group.prompt.messages] for group in groups]
        rest["turns"] = [[[t.start, t.stop, t.reward, dict(t.info)] for t in c.turns] for c in completions]
        rest["messages"] = [completion.messages for completion in completions]
    tensors = {
        "ids": torch.tensor([i for c in completions for i in c.ids], dtype=torch.int64),
        "mask": torch.tensor([emitted for c in completions for emitted in c.mask], dtype=torch.bool),
        "sampler_logp": torch.tensor([logp for c in completions for logp in c.sampler_logp], dtype=torch.float64),
        "lengths": torch.tensor([len(c.ids) for c in completions], dtype=torch.int64),
    }
    if all(c.routes is not None for c in completions):
        tensors["routes"] = torch.tensor([route for c in completions for route in c.routes or ()], dtype=torch.int64)
    with atomic_write(file) as unfinished:
        save_file(tensors, unfinished, metadata={"rollouts": json.dumps(rest)})


def read_rollouts(file: Path, requests: Sequence[Request], asked: str) -> tuple[list[RolloutGroup], Metrics] | None:
    """The groups and the generator's figures; None where the file is not there, not whole or not what was asked for,
    as one without masks is not: it is then sampled again."""
    try:
        with safe_open(file, framework="pt") as saved:
            rest = json.loads(saved.metadata()["rollouts"])
            tensors = {name: saved.get_tensor(name) for name in ("ids", "mask", "sampler_logp", "lengths")}
            routes = saved.get_tensor("routes") if "routes" in saved.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if rest["asked"] != asked:
        return None
    lengths = tensors.pop("lengths").tolist()
    per_token = ([part.tolist() for part in tensor.split(lengths)] for tensor in tensors.values())
    routed = [None] * len(lengths) if routes is None else [tuple(part.tolist()) for part in routes.split(lengths)]
    completions = (
        Completion(
            ids=tuple(ids),
            mask=tuple(mask),
            sampler_logp=tuple(sampler_logp),
            finish_reason=FinishReason(reason),
            text=text,
            weights_version=version,
            routes=route,
            turns=tuple(Turn(start=a, stop=b, reward=reward, info=info) for a, b, reward, info in turns),
            messages=None if messages is None else tuple(messages),
        )
        for ids, mask, sampler_logp, reason, text, version, route, turns, messages in zip(
            *per_token,
            rest["finish_reasons"],
            rest["texts"],
            rest["weights_versions"],
            routed,
            rest.get("turns", [()] * len(lengths)),
            rest.get("messages", [None] * len(lengths)),
            strict=True,
        )
    )
    prompts = [request.prompt for request in requests]
    if "prompts" in rest:
        prompts = [
            replace(prompt, ids=tuple(ids), text=text, messages=None if messages is None else tuple(messages))
            for prompt, (ids, text, messages) in zip(prompts, rest["prompts"], strict=True)
        ]
    groups = [
        RolloutGroup(prompt=prompt, completions=tuple(itertools.islice(completions, size)))
        for prompt, size in zip(prompts, rest["sizes"], strict=True)
    ]
    return groups, rest["figures"]


def write_scores(file: Path, groups: Sequence[ScoredGroup], asked: str) -> None:
    """Scores as JSON, whose numbers are read back as they were."""
    scores = [
        [[one.total, dict(one.parts), one.token_rewards, dict(one.logged), dict(one.extra)] for one in group.scores]
        for group in groups
    ]
    with atomic_write(file) as unfinished:
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
                Score(
                    total=total,
                    parts=parts,
                    token_rewards=None if tokens is None else tuple(tokens),
                    logged=logged,
                    extra=extra,
                )
                for total, parts, tokens, logged, extra in scores
            ),
        )
        for group, scores in zip(groups, saved["scores"], strict=True)
    ]
