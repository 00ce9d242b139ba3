"""The card of a model says what it was made of, and nothing of the machine."""

from __future__ import annotations

import pytest
import yaml

from commandline import tether, workspace
from runs import HELD_OUT, LINES
from tether.training.card import card


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def parts(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("name", LINES)
def test_every_model_has_one(name, here, tiny):
    more = f"{HELD_OUT} --eval-group-size 2" if name in ("rejection-sampling", "ppo", "grpo") else ""
    line = f"{LINES[name]} {more} --seed 5 --quiet --model {tiny}"
    assert tether(f"{line} --out out") == 0
    text = (here / "out" / "model" / "README.md").read_text()
    front, body = parts(text)
    assert front["tags"] == ["tether", name]
    assert front["pipeline_tag"] == ("text-classification" if name == "reward" else "text-generation")
    assert f"`tether {name}`" in body
    assert "| seed | 5 |" in body
    assert str(here) not in text
    assert tiny not in text
    if more:
        assert "| policy |" in body
        assert "| reference |" in body
    assert tether(f"{line} --out again") == 0
    assert (here / "again" / "model" / "README.md").read_text() == text


def test_an_adapters_names_peft(here, tiny):
    assert tether(f"{LINES['dpo']} --lora-rank 2 --quiet --model {tiny} --out out") == 0
    front, body = parts((here / "out" / "model" / "README.md").read_text())
    assert front["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in body
    assert "accuracy on held-out pairs" in body


def test_names_are_text_and_hub_ids_stay():
    options = {
        "command": "grpo",
        "model": "someone/model",
        "prompts": "/home/me/secret/a|b<script>.jsonl",
        "reward": ["x:=/home/me/r.py:fn=0.5", "length:3"],
        "kl_coef": 0.5,
    }
    text = card(options, {}, adapter=False)
    front, body = parts(text)
    assert front["base_model"] == "someone/model"
    assert "secret" not in text
    assert "| prompts | a\\|b\\<script\\>.jsonl |" in body
    assert "| reward | x (weight 0.5) |" in body
    assert "Not measured on held-out data." in body
    assert "| kl\\_coef | 0.5 |" in body
