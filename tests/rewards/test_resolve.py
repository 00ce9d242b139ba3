"""From ``--reward`` values to rewards."""

import sys

import pytest
import torch

from helpers import group
from tether.errors import ModelError, RewardError
from tether.rewards.resolve import resolve_reward, resolve_scorer, split_weight


@pytest.mark.parametrize(
    ("spec", "name", "weight"),
    [
        ("R", "R", 1.0),
        ("R=0.5", "R", 0.5),
        ("R=-2", "R", -2.0),
        ("R=1e-3", "R", 0.001),
        ("length:40=0.1", "length:40", 0.1),
        ("format:a=b", "format:a=b", 1.0),
        ("format:a=b=2", "format:a=b", 2.0),
        ("sweep/lr=1e-5/model", "sweep/lr=1e-5/model", 1.0),
        ("R=", "R=", 1.0),
        ("=0.5", "=0.5", 1.0),
    ],
)
def test_split_weight(spec, name, weight):
    assert split_weight(spec) == (name, weight)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_is_finite(weight):
    with pytest.raises(RewardError, match=f"--reward R={weight}: the weight must be a finite number"):
        split_weight(f"R={weight}")


def test_several_rewards_as_one_scorer(tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text("def seven(completions):\n    return [7.0 for _ in completions]\n")
    scorer = resolve_scorer(["length:4", "repetition=2", f"{tmp_path}/mine.py:seven=0.1"], tokenizer)
    (scored,) = scorer.score([group([0, 5], [[6, 7, 1], [8, 1]])])
    assert [dict(score.parts) for score in scored.scores] == [
        {"length": -0.25, "repetition": 0.0, "seven": 7.0},
        {"length": -0.5, "repetition": 0.0, "seven": 7.0},
    ]
    assert [score.total for score in scored.scores] == pytest.approx([0.45, 0.2])


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("lenght", RewardError, "lenght: no such reward; give a reward-model directory .* length, repetition, format"),
        ("a/b/c", RewardError, "a/b/c: no such reward"),
        ("lenght:40", RewardError, "no built-in reward has this name, and there is no module 'lenght'"),
        ("length", RewardError, "needs a target in tokens"),
        ("mine.py", RewardError, "mine.py: name the function too, as in mine.py:FUNCTION"),
        ("missing.py:f", RewardError, "no such file to take a reward function from"),
        ("base", ModelError, "base: not a reward model: its architecture is LlamaForCausalLM"),
    ],
)
def test_rewards_that_are_none(tokenizer, spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text("def seven(completions): ...\n")
    with pytest.raises(error, match=message):
        resolve_reward(spec, tokenizer, dtype=torch.float32, device="cpu")
