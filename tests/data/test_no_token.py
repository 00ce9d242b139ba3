"""Prompts that come to no token: pairs have an empty shared prompt; nothing else can follow one."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, normalizers
from transformers import AutoModelForSequenceClassification

from commandline import read_rows, tether, write_rows
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model, score_sequences
from tiny import byte_tokenizer, make_model

APART = [
    {"chosen": "yes", "rejected": "no"},
    {"chosen": "a b c d e", "rejected": "b"},
    {"chosen": "a", "rejected": "b"},
]


def bare(*, strips: bool = False):
    """A tokenizer without BOS, which may strip what it reads of stars."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    if strips:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\*+"), "")
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer


@pytest.fixture
def here(tmp_path):
    make_model(tmp_path / "m")
    bare(strips=True).save_pretrained(tmp_path / "m")
    return tmp_path


def test_sides_that_differ_at_once_have_an_empty_prompt(tmp_path):
    pairs = load_pairs(str(write_rows(tmp_path / "a.jsonl", APART)), bare(), context=40)
    assert [pair.prompt_ids for pair in pairs] == [()] * 3
    explicit = [{"prompt": "***", **row} for row in APART]
    assert load_pairs(str(write_rows(tmp_path / "b.jsonl", explicit)), bare(strips=True), context=40) == pairs


def test_scores_of_such_pairs_are_those_of_transformers(here):
    model, tokenizer = new_reward_model(str(here / "m"), seed=0)
    shared = [{"prompt": "q: ", "chosen": "x", "rejected": "yz"}]
    pairs = load_pairs(str(write_rows(here / "a.jsonl", APART + shared)), tokenizer, context=40)
    rows = [(pair.prompt_ids, side) for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)]
    save_reward_model(model, tokenizer, here / "rm", rows)
    scores = score_sequences(load_reward_model(str(here / "rm"))[0], rows)
    theirs = AutoModelForSequenceClassification.from_pretrained(here / "rm")
    for (prompt, side), score in zip(rows, scores, strict=True):
        alone = theirs(input_ids=torch.tensor([[*prompt, *side]])).logits.squeeze()
        torch.testing.assert_close(score, alone.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "**"}])
def test_the_command_trains_on_them(here, monkeypatch, prompt):
    monkeypatch.chdir(here)
    write_rows(here / "pairs.jsonl", [{**prompt, "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)])
    write_rows(here / "held.jsonl", [{**prompt, "chosen": f"yes, {i}", "rejected": f"no, {i}"} for i in range(2)])
    line = "reward --model m --pairs pairs.jsonl --eval-pairs held.jsonl --batch-size 4 --epochs 1 --quiet"
    assert tether(f"{line} --out out") == 0
    assert all(row["loss"] > 0 for row in read_rows(here / "out" / "metrics.jsonl"))
    assert tether("eval --reward-model out/model --pairs held.jsonl") == 0


def test_pairs_without_a_prompt_can_be_held_out(here, monkeypatch):
    monkeypatch.chdir(here)
    write_rows(here / "pairs.jsonl", [{"chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)])
    assert tether("reward --model m --pairs pairs.jsonl --batch-size 9 --epochs 1 --quiet --out out") == 0
    assert len(read_rows(here / "out" / "metrics.jsonl")) == 2


def test_all_pairs_of_one_prompt_cannot_be_held_out_in_part(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    write_rows(here / "pairs.jsonl", [{"prompt": "q", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)])
    assert tether("reward --model m --pairs pairs.jsonl --quiet --out out") == 2
    assert "pairs.jsonl: all pairs have one prompt, so none can be held out" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (lambda *a, **k: load_prompts(*a, max_new_tokens=2, **k), {"prompt": "***"}),
        (load_demonstrations, {"prompt": "***", "completion": "a"}),
        (load_demonstrations, {"text": "***"}),
    ],
)
def test_nothing_else_can_follow_no_token(tmp_path, read, row):
    good = {"prompt": "ab", "completion": "c"}
    with pytest.raises(DataError, match=r"a.jsonl:2: the (prompt|text) comes to no token"):
        read(str(write_rows(tmp_path / "a.jsonl", [good, row])), bare(strips=True), context=40)
    read(str(tmp_path / "a.jsonl"), byte_tokenizer(), context=40)  # with a BOS there is a state to begin from
