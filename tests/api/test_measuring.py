"""``tether.generate``, ``score`` and ``evaluate`` against the functions below them and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

import tether
from tether.data.records import load_prompts
from tether.models.loading import context_length, load_policy

PROMPTS = ["Word one is", "And two", "Three"]


def lengths(completions, **_):
    return [float(len(c) % 5) for c in completions]


@pytest.fixture(scope="module")
def changed(tiny):
    """A policy that differs from the tiny one."""
    model, tokenizer = load_policy(tiny)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)
    return model, tokenizer


def test_generate_is_the_engine(tiny):
    model, tokenizer = load_policy(tiny)
    prompts = load_prompts(PROMPTS, tokenizer, context=context_length(model), max_new_tokens=6)
    asked = tether.make_requests(prompts, group_size=2, seed=3)
    expected = tether.Engine(model, tokenizer).generate(asked, sampling=tether.Sampling(max_new_tokens=6))
    found = tether.generate(tiny, PROMPTS, group_size=2, seed=3, max_new_tokens=6)
    assert found == expected
    assert found == tether.generate(model, PROMPTS, tokenizer=tokenizer, group_size=2, seed=3, max_new_tokens=6)


def test_evaluate_by_a_naive_loop(tiny, changed):
    policy, tokenizer = changed
    found = tether.evaluate(policy, tiny, PROMPTS, lengths, tokenizer=tokenizer, group_size=4, max_new_tokens=8)
    differences, wins = [], []
    for own, other in zip(found.groups, found.reference_groups, strict=True):
        pairs = [(a.total, b.total) for a, b in zip(own.scores, other.scores, strict=True)]
        differences.append(sum(a - b for a, b in pairs) / len(pairs))
        wins.append(sum(0.5 if a == b else float(a > b) for a, b in pairs) / len(pairs))
    mean = sum(differences) / 3
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    assert found.difference.value == pytest.approx(mean)
    assert found.difference.high - mean == pytest.approx(4.302653 * spread / math.sqrt(3), rel=1e-5)  # t, 2 degrees
    assert found.win_rate.value == pytest.approx(sum(wins) / 3)
    assert found.reward.value == pytest.approx(found.policy.reward)
    assert found.kl == found.policy.kl > 0
    assert found.reference.kl == 0
    assert f"[{found.difference.low:.3f}, {found.difference.high:.3f}]" in str(found)
    assert "<td>" in found._repr_html_()


def test_a_policy_beside_itself(tiny):
    found = tether.evaluate(tiny, tiny, PROMPTS, lengths, group_size=2, max_new_tokens=6)
    assert (found.difference.value, found.win_rate.value, found.kl) == (0.0, 0.5, 0.0)


def test_completions_without_a_reward_are_in_no_comparison(tiny, changed):
    policy, tokenizer = changed

    def some(prompts, completions):
        return [None if p == "Three" else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    found = tether.evaluate(policy, tiny, PROMPTS, some, tokenizer=tokenizer, group_size=2, max_new_tokens=6)
    assert found.difference.prompts == 2
    assert found.policy.completions_without_reward == 2


def test_score():
    def words(prompts, completions, answer):
        return [float(a in p + c) for p, c, a in zip(prompts, completions, answer, strict=True)]

    rows = [{"prompt": "Two and two is", "answer": "four"}, {"prompt": "One and one is", "answer": "two"}]
    found = tether.score({"right": words, "length": ("length:1", 0.5)}, rows, [" four", " four"])
    assert [one.parts["right"] for one in found] == [1.0, 0.0]
    assert [one.total for one in found] == [one.parts["right"] + 0.5 * one.parts["length"] for one in found]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda tiny: tether.generate(tiny, PROMPTS, max_new_token=3),
            "unknown argument 'max_new_token'; did you mean",
        ),
        (lambda tiny: tether.generate(tiny, PROMPTS, group_size=0), "group_size must be at least 1, found 0"),
        (lambda tiny: tether.generate(load_policy(tiny)[0], PROMPTS), "model: a model in memory needs its tokenizer"),
        (lambda tiny: tether.generate(3, PROMPTS), "model: found int; give a directory, a hub id or a model"),
        (lambda tiny: tether.evaluate(tiny, "base", PROMPTS, lengths), "reference: its tokenizer is not the policy's"),
        (lambda tiny: tether.score(lengths, ["a"], []), "completions: 0 completions for 1 prompts"),
        (lambda tiny: tether.score([], ["a"], ["b"]), "rewards must hold at least one"),
    ],
)
def test_errors_name_the_argument(tiny, call, message):
    with pytest.raises(tether.TetherError) as caught:
        call(tiny)
    assert message in str(caught.value)
