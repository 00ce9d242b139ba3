"""The completions of a run, as its files hold them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import RunError, TetherError
from tether.evaluation import EVALUATION
from tether.models.loading import load_tokenizer
from tether.report.files import reading
from tether.runtime.directory import CONFIG
from tether.untrusted import read_flat_yaml


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a completion, and its figures; None where the file does not hold one."""

    text: str
    emitted: bool
    """Whether the policy emitted it."""
    logp: float | None
    kl: float | None
    """sampler_logp - ref_logp, nats."""
    advantage: float | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion."""

    model: str
    """policy or reference, of held-out completions; else ""."""
    prompt: str
    completion: str
    score: float | None
    parts: Mapping[str, float | None]
    kl: float | None
    advantage: float | None
    length: int
    """Tokens that the policy emitted."""
    finish_reason: str
    ids: Sequence[int]
    """Token ids; none of held-out completions."""
    row: Mapping[str, Any]
    """The whole row of the file."""


def rollout_file(run: Path, step: int | None) -> Path:
    """The rollouts of a step, or the newest ones. Raises :class:`RunError` that names the steps there are."""
    require_run(run)
    found = {
        int(match[1]): file
        for file in sorted((run / "rollouts").glob("step_*.parquet"))
        if (match := re.fullmatch(r"step_(\d+)\.parquet", file.name))
    }
    if not found:
        require_completions(run)
        hint = "its held-out completions are shown by --held-out" if (run / EVALUATION).is_file() else ""
        raise RunError("has no rollouts", where=run, hint=hint)
    if step is None:
        return found[max(found)]
    if step not in found:
        steps = [str(one) for one in found]
        listed = ", ".join(steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-5:]])
        raise RunError(f"has no rollouts of step {step}", where=run, hint=f"there are those of step {listed}")
    return found[step]


def held_out_file(run: Path) -> Path:
    """The held-out completions of a run. Raises :class:`RunError` where it has none."""
    require_run(run)
    if not (run / EVALUATION).is_file():
        require_completions(run)
        raise RunError(f"has no {EVALUATION}", where=run, hint="a finished run with --eval-prompts has one")
    return run / EVALUATION


def require_run(run: Path) -> None:
    """Raise :class:`RunError`, with the run above it if there is one, unless ``run`` is a run directory."""
    if not (run / CONFIG).is_file():
        above = next((path for path in run.absolute().parents if (path / CONFIG).is_file()), None)
        hint = f"it is part of the run {above}" if above is not None and run.exists() else ""
        raise RunError(f"not a run directory: {CONFIG} is missing", where=run, hint=hint)


def require_completions(run: Path) -> None:
    """Raise :class:`RunError` for a run of a kind that writes no completions, with what there is to look at instead."""
    command = read_flat_yaml(run / CONFIG).get("command")
    if command == "reward":
        hint = f"tether report {run} shows the pairs it gets wrong"
        raise RunError("is a reward-model run, which writes no completions", where=run, hint=hint)
    if command == "sft":
        hint = f"tether chat {run}/model and tether generate show what it writes"
        raise RunError("is an sft run, which writes no completions in training", where=run, hint=hint)


def read_completions(file: Path) -> list[Sample]:
    """The completions of a rollout file, or of a file of held-out ones."""
    import pyarrow.parquet

    with reading(file), file.open("rb") as source:
        return [completion_of(row) for row in pyarrow.parquet.read_table(source).to_pylist()]


def completion_of(row: Mapping[str, Any]) -> Sample:
    """A row of either kind of file. Rollouts of earlier versions have ``reward/NAME`` in place of ``rewards/NAME``."""
    names = [name for name in row if name.startswith(("rewards/", "reward/"))]
    mask = row.get("mask")
    return Sample(
        model=str(row.get("model", "")),
        prompt=str(row["prompt"]),
        completion=str(row["completion"]),
        score=row["score"],
        parts={name.partition("/")[2]: row[name] for name in names},
        kl=row.get("kl"),
        advantage=row.get("advantage"),
        length=int(row["length"]) if mask is None else sum(mask),
        finish_reason=str(row["finish_reason"]),
        ids=row.get("completion_ids") or (),
        row=row,
    )


def numbered(found: Sequence[Sample]) -> list[tuple[int, Sample]]:
    """Each completion with its number among those of its prompt, from 0."""
    seen: Counter[str] = Counter()
    numbers = []
    for one in found:
        numbers.append((seen[one.prompt], one))
        seen[one.prompt] += 1
    return numbers


def different_prompts_first(found: Sequence[Sample]) -> list[Sample]:
    """The first completion of each prompt, then the second of each, and so on."""
    return [one for _, one in sorted(numbered(found), key=lambda pair: pair[0])]


def references_of(found: Sequence[Sample]) -> dict[int, Sample]:
    """``id`` of a held-out completion of the policy to the reference's for the same prompt and seed: both models have
    as many of each prompt, in the same order."""
    theirs = {(one.prompt, i): one for i, one in numbered([one for one in found if one.model == "reference"])}
    own = numbered([one for one in found if one.model != "reference"])
    return {id(one): theirs[one.prompt, i] for i, one in own if (one.prompt, i) in theirs}


def tokenizer_of(run: Path) -> Any:
    """The tokenizer of a run: of its result, or of its newest checkpoint, or of the model that it began with."""
    models = [run / "model", *sorted(run.glob("checkpoints/*/model"), reverse=True)]
    names = [*(str(path) for path in models if path.is_dir()), str(read_flat_yaml(run / CONFIG).get("model", ""))]
    for name in names[:-1]:
        try:
            return load_tokenizer(name)
        except TetherError:
            continue  # a run that is saving it just now
    return load_tokenizer(names[-1])


def tokens_of(sample: Sample, tokenizer: Any) -> list[Token]:
    """The tokens of a completion. A character that takes several tokens stands at the last of them."""
    with reading(Path("rollouts")):
        logp, mask = sample.row["sampler_logp"], sample.row["mask"]
        ref_logp = sample.row.get("ref_logp") or [None] * len(logp)
        advantages = sample.row.get("advantages") or [None] * len(logp)
        return [
            Token(
                text=text,
                emitted=own,
                logp=one if own else None,
                kl=one - reference if own and reference is not None else None,
                advantage=advantage if own else None,
            )
            for text, own, one, reference, advantage in zip(
                token_texts(sample.ids, tokenizer), mask, logp, ref_logp, advantages, strict=True
            )
        ]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text of those before it; "" where it completes no character."""
    texts, begin, known = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[begin:end]), clean_up_tokenization_spaces=False))
        if text.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        if end - begin > 8:  # so that a long completion is not decoded anew for each token
            begin = end - 1
            known = str(tokenizer.decode(list(ids[begin:end]), clean_up_tokenization_spaces=False))
        else:
            known = text
    return texts
