"""The journal gives back what was sampled and scored, bit by bit, and only to the one who asks the same again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import FunctionScorer, completion
from tether.runtime.directory import RunDirectory
from tether.runtime.journal import Journal, JournaledGenerator, JournaledScorer
from tether.types import Prompt, Request, RolloutGroup, Sampling, Score, ScoredGroup

SAMPLING = Sampling(max_new_tokens=6)
REQUESTS = [
    Request(prompt=Prompt(ids=(0, 5), text="p", columns={"answer": 4}), seeds=(11, 2**62 + 1)),
    Request(prompt=Prompt(ids=(0, 6, 7), text="q"), seeds=(13,)),
]


class Scripted:
    """A generator that gives the same completions each time and counts its calls."""

    def __init__(self):
        self.calls = 0

    def generate(self, requests, *, sampling):
        self.calls += 1
        rows = [
            replace(
                completion(
                    [4, 8, 8, 1], mask=[True, False, False, True], logprobs=[-1 / 3, 0.0, 0.0, -1e-17], text="é"
                ),
                weights_version=3,
            ),
            replace(completion([9]), weights_version=4),
        ]
        return [RolloutGroup(prompt=r.prompt, completions=tuple(rows[: len(r.seeds)])) for r in requests]

    def load_weights(self, version, weights):
        raise AssertionError

    def figures(self):
        return {"sampling/calls": float(self.calls)}


@pytest.fixture
def journal(tmp_path):
    directory = RunDirectory(tmp_path / "run", {})
    directory.make()
    return Journal(directory)


def sample(journal, inner, requests=REQUESTS, sampling=SAMPLING):
    """The groups and figures of a step, as a process that begins it has them."""
    journal.begin(1)
    generator = JournaledGenerator(inner, journal)
    return generator.generate(requests, sampling=sampling), generator.figures()


def test_a_repeated_step_gets_the_same_rollouts(journal):
    inner = Scripted()
    first = sample(journal, inner)
    assert sample(journal, inner) == first
    assert inner.calls == 1
    assert first == (Scripted().generate(REQUESTS, sampling=SAMPLING), {"sampling/calls": 1.0})


OTHER = {
    "a seed": ([REQUESTS[0], replace(REQUESTS[1], seeds=(14,))], SAMPLING),
    "a completion less": ([replace(REQUESTS[0], seeds=(11,)), REQUESTS[1]], SAMPLING),
    "a prompt": ([REQUESTS[0], replace(REQUESTS[1], prompt=Prompt(ids=(0, 6, 8), text="q"))], SAMPLING),
    "the order": (REQUESTS[::-1], SAMPLING),
    "the sampling": (REQUESTS, Sampling(max_new_tokens=6, temperature=0.5)),
}


@pytest.mark.parametrize(("requests", "sampling"), OTHER.values(), ids=OTHER.keys())
def test_another_question_is_sampled_again(journal, requests, sampling):
    inner = Scripted()
    sample(journal, inner)
    groups, _ = sample(journal, inner, requests, sampling)
    assert inner.calls == 2
    assert groups == Scripted().generate(requests, sampling=sampling)


def without_mask(file):
    tensors = load_file(file)
    del tensors["mask"]
    with safe_open(file, framework="pt") as saved:
        metadata = saved.metadata()
    save_file(tensors, file, metadata=metadata)


DAMAGES = {
    "without a mask": without_mask,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_file_that_cannot_be_used_is_sampled_again(journal, damage):
    inner = Scripted()
    first, _ = sample(journal, inner)
    damage(journal.file("rollouts"))
    assert sample(journal, inner)[0] == first
    assert inner.calls == 2
    assert sample(journal, inner)[0] == first
    assert inner.calls == 2


def test_each_call_of_a_step_has_its_own_rollouts(journal):
    inner = Scripted()
    for _ in range(2):
        journal.begin(1)
        generator = JournaledGenerator(inner, journal)
        found = [generator.generate(requests, sampling=SAMPLING) for requests in (REQUESTS, REQUESTS[:1])]
        assert [len(groups) for groups in found] == [2, 1]
    assert inner.calls == 2


class PerToken:
    """A scorer with parts and token rewards, which counts its calls."""

    def __init__(self):
        self.calls = 0

    def score(self, groups):
        self.calls += 1
        return [
            ScoredGroup(
                rollouts=group,
                scores=tuple(
                    Score(
                        total=0.1 + i, parts={"a": 1 / 3, "b": None}, token_rewards=(0.1 + i, *[0.0] * (len(c.ids) - 1))
                    )
                    for i, c in enumerate(group.completions)
                ),
            )
            for group in groups
        ]


def test_scores_are_kept_for_the_same_completions_alone(journal):
    inner = PerToken()
    groups, _ = sample(journal, Scripted())
    scorer = JournaledScorer(inner, journal)
    first = scorer.score(groups)
    assert scorer.score(groups) == first == PerToken().score(groups)
    assert inner.calls == 1
    assert scorer.score(groups[:1]) == first[:1]
    assert inner.calls == 2


def test_nothing_is_written_before_the_run_has_a_directory(tmp_path):
    journal = Journal(RunDirectory(tmp_path / "run", {}))
    groups, _ = sample(journal, Scripted())
    JournaledScorer(FunctionScorer(lambda prompt, completion: 1.0), journal).score(groups)
    assert not (tmp_path / "run").exists()
    journal.write()
    inner = Scripted()
    assert sample(journal, inner)[0] == groups
    assert inner.calls == 0
