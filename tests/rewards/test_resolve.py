"""From ``--reward`` values to rewards."""

import os
import sys

import pytest
import torch

from helpers import completion, group
from tether.errors import ModelError, RewardError
from tether.rewards.resolve import part_names, resolve_reward, resolve_scorer, short_name, split_name, split_weight
from tether.rewards.rules import MEANINGS, RULES, rules_like
from tether.types import Prompt, RolloutGroup


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
        ("regex:a=b", "regex:a=b", 1.0),
        ("math:answer:2=0.5", "math:answer:2", 0.5),
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


@pytest.mark.parametrize(
    ("value", "weight", "spec"),
    [
        ("length:10=abc", "abc", "length:10"),
        ("length:10=", "", "length:10"),
        ("overlong:10:5=x", "x", "overlong:10:5"),
        ("cosine:9:exact_answer=x", "x", "cosine:9:exact_answer"),
        ("repetition=0,5", "0,5", "repetition"),
        ("short:=length:10=half", "half", "length:10"),
        ("mine.py:fn=2x", "2x", "mine.py:fn"),
        ("package.module:fn=2x", "2x", "package.module:fn"),
        ("judge/model=2x", "2x", "judge/model"),
    ],
)
def test_a_weight_that_is_no_number(value, weight, spec, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge" / "model").mkdir(parents=True)
    with pytest.raises(RewardError) as caught:
        resolve_scorer([value], tokenizer)
    assert str(caught.value) == (
        f"--reward {value}: the weight {weight!r} is not a number; write {spec}=0.5 for half of it"
    )


def test_an_equals_sign_that_belongs_to_a_reward_is_no_weight(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolve_scorer(["format:a=b", "also:=format:a=b=2", "regex:a=b"], tokenizer)
    (tmp_path / "sweep" / "lr=1e-5 b").mkdir(parents=True)
    (tmp_path / "sweep" / "lr").mkdir()
    with pytest.raises(ModelError):  # read as a model, which it is not
        resolve_scorer(["sweep/lr=1e-5 b"], tokenizer)


def test_every_rule_has_a_meaning():
    assert MEANINGS.keys() == RULES.keys()
    for name, (form, _) in MEANINGS.items():
        assert form.partition(":")[0] == name
        assert form in rules_like("")


def test_several_rewards_as_one_scorer(tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text("def seven(completions):\n    return [7.0 for _ in completions]\n")
    scorer = resolve_scorer(["length:4", "repetition=2", f"{tmp_path}/mine.py:seven=0.1"], tokenizer)
    (scored,) = scorer.score([group([0, 5], [[6, 7, 1], [8, 1]])])
    assert [dict(score.parts) for score in scored.scores] == [
        {"length": -0.25, "repetition": 0.0, "seven": 7.0},
        {"length": -0.5, "repetition": 0.0, "seven": 7.0},
    ]
    assert [score.total for score in scored.scores] == pytest.approx([0.45, 0.2])


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name", "rest"),
    [
        ("short:=length:40=0.1", "short", "length:40=0.1"),
        ("a-B_2.c:=R", "a-B_2.c", "R"),
        ("format:=x", "format", "x"),
        ("R=0.5", None, "R=0.5"),
        ("length:40", None, "length:40"),
        ("format:[=]x", None, "format:[=]x"),
        ("format:a:=b", None, "format:a:=b"),
        ("file.py:fn=2", None, "file.py:fn=2"),
        ("sweep/lr=1e-5/model", None, "sweep/lr=1e-5/model"),
    ],
)
def test_split_name(value, name, rest):
    assert split_name(value) == (name, rest)


@pytest.mark.parametrize("name", ["", "two words", "a/b", "é", "a=b", "a\n"])
def test_a_name_is_made_of_few_characters(name):
    with pytest.raises(RewardError) as caught:
        split_name(f"{name}:=length:4")
    assert str(caught.value) == (
        f"--reward {name}:=length:4: "
        f"the name {name!r} of a reward may hold ASCII letters, digits, '_', '-' and '.' only"
    )


def test_a_name_of_nothing():
    with pytest.raises(RewardError, match="--reward short:=: no reward after the name; write NAME:=SPEC"):
        split_name("short:=")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("length:40", "length"),
        ("repetition", "repetition"),
        ("some/rewards.py:speech", "speech"),
        ("package.module:speech", "speech"),
        ("runs/judge/model", "judge"),
        ("runs/judge", "judge"),
        ("owner/judge", "judge"),
    ],
)
def test_short_name(spec, name):
    assert short_name(spec) == name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("model", "judge"),
        ("./model", "judge"),
        ("model/", "judge"),
        (".", "judge"),
        ("..", "runs"),
        ("../model", "runs"),
        ("../other/model", "other"),
        ("../..", None),
        ("/model", "model"),
        ("/", "reward"),
    ],
)
def test_a_path_without_a_name_has_that_of_its_directory(tmp_path, monkeypatch, spec, name):
    """Given as an absolute path, as a run keeps it, it has the same name."""
    (tmp_path / "runs" / "judge").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "judge")
    assert short_name(spec) == (name or tmp_path.name)
    assert short_name(os.path.abspath(spec)) == short_name(spec)


def test_rewards_that_share_a_short_name_are_named_in_full():
    same = [(None, "length:40"), (None, "length:80"), (None, "repetition")]
    assert part_names(same) == ["length:40", "length:80", "repetition"]
    assert part_names([("length", "repetition"), (None, "length:80")]) == ["length", "length:80"]
    assert part_names([("short", "length:40"), (None, "length:80")]) == ["short", "length"]
    assert part_names([("a", "length:40"), ("b", "length:40")]) == ["a", "b"]
    assert part_names([(None, "a.py:f\n"), (None, "b.py:f\n")]) == ["a.py:f\\n", "b.py:f\\n"]


@pytest.mark.parametrize(
    "rewards", [[(None, "length:40"), (None, "length:40")], [("a", "length:40"), ("a", "length:80")]]
)
def test_two_rewards_of_one_name(rewards):
    with pytest.raises(RewardError, match=r"two rewards are named '.*'; .* another name: --reward NAME:=SPEC"):
        part_names(rewards)


def test_names_are_those_of_the_parts_and_of_the_errors(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(
        "def seven(completions):\n    return [7.0 for _ in completions]\ndef none(completions):\n    return 0\n"
    )
    asked = ["length:4", "length:2=0.5", "seven.8:=length:1=-1", f"mine:={tmp_path}/mine.py:seven"]
    (scored,) = resolve_scorer(asked, tokenizer).score([group([0, 5], [[6, 7, 1], [8, 1]])])
    assert [dict(score.parts) for score in scored.scores] == [
        {"length:4": -0.25, "length:2": -0.5, "seven.8": -2.0, "mine": 7.0},
        {"length:4": -0.5, "length:2": 0.0, "seven.8": -1.0, "mine": 7.0},
    ]
    assert [score.total for score in scored.scores] == pytest.approx([-0.25 - 0.25 + 2 + 7, -0.5 + 1 + 7])
    with pytest.raises(RewardError, match="reward 'mine' must return a list"):
        resolve_scorer([f"mine:={tmp_path}/mine.py:none"], tokenizer).score([group([0, 5], [[6, 7, 1]])])


def test_two_rewards_of_one_spec_are_refused_before_any_is_loaded(tokenizer):
    with pytest.raises(RewardError, match="two rewards are named 'no/such'"):
        resolve_scorer(["no/such", "no/such=0.5"], tokenizer)


def test_a_regular_expression_that_begins_like_a_weight(tokenizer):
    with pytest.raises(RewardError) as caught:
        resolve_scorer(["format:=x"], tokenizer)
    assert str(caught.value).startswith("x: no such reward; the rules are ")
    assert str(caught.value).endswith("; for text that begins with '=', write format:[=]x")
    with pytest.raises(RewardError, match=r"; for text that begins with '=', write regex:\[=\]x$"):
        resolve_scorer(["regex:=x"], tokenizer)
    (scored,) = resolve_scorer(["format:[=]x"], tokenizer).score([text_group("=x", "x")])
    assert [score.total for score in scored.scores] == [1.0, 0.0]


def text_group(*texts) -> RolloutGroup:
    return RolloutGroup(
        prompt=Prompt(ids=(0,), text="p"), completions=tuple(completion([6, 1], text=text) for text in texts)
    )


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "lenght",
            RewardError,
            r"lenght: no such reward; did you mean length\? the rules are length:N \(0 at N tokens",
        ),
        (
            "nothing-like-it",
            RewardError,
            r"no such reward; the rules are .*; others are a reward-model directory or hub id",
        ),
        ("a/b/c", RewardError, "a/b/c: no such reward"),
        (
            "lenght:40",
            RewardError,
            r"no rule has this name, .* no module 'lenght' .*; did you mean length\? the rules are",
        ),
        ("length", RewardError, "needs a target in tokens"),
        ("mine.py", RewardError, "mine.py: name the function too, as in mine.py:FUNCTION"),
        ("missing.py:f", RewardError, "no such file to import"),
        ("base", ModelError, "base: not a reward model: its architecture is LlamaForCausalLM"),
    ],
)
def test_rewards_that_are_none(tokenizer, spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text("def seven(completions): ...\n")
    with pytest.raises(error, match=message):
        resolve_reward(spec, tokenizer, dtype=torch.float32, device="cpu")
