"""Judges in files: what a file holds, what decides its scores, and what is no judge."""

from dataclasses import replace
from pathlib import Path

import pytest

from tether.errors import ConfigError, RewardError
from tether.rewards.checks import prepared
from tether.rewards.judge_file import JudgeFile, load_judge
from tether.rewards.resolve import part_names, resolve_scorer
from tether.types import Prompt

BASE = JudgeFile(url="http://127.0.0.1:1/v1", model="m", rubric="Be kind.")

YAML = """
url: https://api.example/v1
model: m
rubric: |
  Be kind.
  Be short.
key_env: SOME_KEY
columns: [answer]
options: {temperature: 0.5, seed: 1}
maximum: 5
output_price: 0.6
cache: replies
"""


def test_a_judge_in_a_file(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "kind.yaml").write_text(YAML)
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    scorer = resolve_scorer([f"judge:{tmp_path}/kind.yaml=0.5"], tokenizer, deadline=7.0)
    ((found, weight),) = scorer.rewards
    assert (found.name, found.key, found.deadline, weight) == ("kind", "sk-secret", 7.0, 0.5)
    assert found.file.rubric == "Be kind.\nBe short.\n"
    assert found.file.endpoint == "https://api.example/v1/chat/completions"
    assert found.replies.directory == tmp_path / "replies"
    assert "secret" not in repr(scorer)
    assert found.file.cost(10**6, 10**6) == pytest.approx(0.6)
    prepared(scorer, {"p.jsonl": [Prompt(ids=(0,), text="p", columns={"answer": 1})]}, max_new_tokens=1)
    with pytest.raises(RewardError, match=r"^p.jsonl: reward 'kind' needs the column 'answer', which no prompt has"):
        prepared(scorer, {"p.jsonl": [Prompt(ids=(0,), text="p")]}, max_new_tokens=1)
    assert part_names([(None, "judge:a/kind.yaml"), (None, "judge:two words.yml")]) == ["kind", "two_words"]


def test_the_example(monkeypatch):
    """It is the one that the page shows."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    example = root / "examples" / "helpful.yaml"
    file, key = load_judge(example)
    assert (file.endpoint, key) == ("https://api.openai.com/v1/chat/completions", "sk-x")
    _, shown = example.read_text().split("\n", 1)
    assert shown in (root / "docs" / "remote_rewards.md").read_text()


def test_what_decides_the_scores_is_its_fingerprint():
    assert replace(BASE, url="https://elsewhere/v1", tries=9, cache="x").fingerprint() == BASE.fingerprint()
    for change in ({"rubric": "x"}, {"model": "x"}, {"minimum": -1.0}, {"columns": ("a",)}, {"options": {}}):
        assert replace(BASE, **change).fingerprint() != BASE.fingerprint()


WRONG = {
    "no file": (None, ConfigError, r"cannot be read \(No such file or directory\)"),
    "no model": ("url: http://h/v1\nrubric: x", ConfigError, "model is missing"),
    "a mistyped name": (YAML + "maxmum: 3", ConfigError, "unknown option 'maxmum'; did you mean maximum"),
    "an address": (YAML.replace("https://", "ftp://"), RewardError, "not an address"),
    "a key in the address": (YAML.replace("/v1", "/v1?key=x"), RewardError, "no user, password, query"),
    "a key in the clear": (YAML.replace("https", "http"), RewardError, "SOME_KEY would be sent over an unencrypted"),
    "no key": (YAML.replace("SOME_KEY", "OTHER_KEY"), RewardError, "OTHER_KEY, with the key of the judge, is not set"),
    "a range": (YAML.replace("maximum: 5", "maximum: 0"), ConfigError, "minimum must be below maximum"),
    "an infinite one": (YAML.replace("maximum: 5", "maximum: .inf"), ConfigError, "must be finite"),
    "a type": (YAML + "tries: many", ConfigError, "tries must be an integer, found 'many'"),
    "options": (YAML.replace("seed: 1", "stream: true"), ConfigError, "options must not hold model, messages"),
    "options that are none": (
        YAML.replace("{temperature: 0.5, seed: 1}", "3"),
        ConfigError,
        "options must be a mapping",
    ),
    "a pattern": (YAML + "pattern: 'score: .*'", ConfigError, "pattern must have one group, for the score; it has 0"),
    "no pattern": (YAML + "pattern: '('", ConfigError, "pattern is no regular expression"),
    "a tag": (YAML + "x: !!python/object:os.system {}", ConfigError, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "kind", "why"), WRONG.values(), ids=WRONG)
def test_files_that_are_none(text, kind, why, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    monkeypatch.delenv("OTHER_KEY", raising=False)
    if text is not None:
        (tmp_path / "kind.yaml").write_text(text)
    with pytest.raises(kind, match=why) as caught:
        load_judge(tmp_path / "kind.yaml")
    assert str(caught.value).startswith(str(tmp_path / "kind.yaml"))
    assert "\n" not in str(caught.value)
