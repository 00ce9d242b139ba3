"""``tether pairs``: pairs that are sampled, labelled and read by ``tether reward``."""

from __future__ import annotations

import json

import pytest

from answering import Answer, answering
from commandline import read_rows, tether, workspace
from tether.looking.pairs import in_words

LINE = "pairs --prompts p.jsonl --max-new-tokens 4 --group-size 4 --out out.jsonl --model"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "f.py").write_text("def prefer(prompts, first, second):\n    return ['second'] * len(first)\n")
    return tmp_path


def test_pairs_are_written_and_a_reward_model_learns_from_them(tiny, here, capsys):
    assert tether(LINE, tiny, "--labeller", "f.py:prefer") == 0
    shown = capsys.readouterr()
    assert shown.out == "out.jsonl\n"
    assert "tether: 10 pairs" in shown.err
    rows = read_rows(here / "out.jsonl")
    assert {row["labeller"] for row in rows} == {"f.py:prefer"}
    assert tether("reward --pairs out.jsonl --test-share 0 --epochs 1 --out rm --quiet --model", tiny) == 0


def test_gold_prefers_what_its_reward_prefers(tiny, here):
    assert tether(LINE, tiny, "--labeller", "gold:r.py:fn") == 0
    rows = read_rows(here / "out.jsonl")
    assert all(len(row["chosen"]) % 5 > len(row["rejected"]) % 5 for row in rows)


def test_a_judge_is_asked_in_both_orders(tiny, here):
    def answer(content):
        asked = json.loads(content["messages"][1]["content"])
        better = "A" if asked["A"] > asked["B"] else "B"
        return Answer({"choices": [{"message": {"content": json.dumps({"better": better})}}]})

    with answering(answer) as server:
        file = {"url": server.url.replace("/get_reward", "/v1"), "model": "m", "rubric": "Be kind."}
        (here / "j.yaml").write_text(json.dumps(file))
        assert tether(LINE, tiny, "--labeller", "judge:j.yaml") == 0
    rows = read_rows(here / "out.jsonl")
    assert rows
    assert all(row["chosen"] > row["rejected"] for row in rows)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--labeller unknown", "unknown: no such labeller; the forms are gold:REWARD"),
        ("--labeller gold:nothing", "no such reward"),
        ("--labeller command:", "no program after command:"),
        ("--labeller command:'", "cannot be split into words"),
        ("--labeller f.py:unknown", "has no function 'unknown'"),
        ("--labeller command:false", "ended with status 1"),
        ("--labeller f.py:prefer --label-noise 0.1", "need a gold labeller"),
        ("--labeller gold:sentiment --label-noise nan", "--label-noise: input should be a finite number"),
        ("--labeller gold:sentiment --label-temperature -1", "label_temperature must be 0 or more"),
        ("--labeller gold:sentiment --label-noise 1.5", "label_noise must be from 0 to 1"),
        ("--labeller f.py:prefer --group-size 3", "group_size must be even"),
        ("--labeller gold:regex:~never~", "no preference was stated"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(tiny, here, capsys, more, said):
    assert tether(f"{LINE} {tiny} {more}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (here / "out.jsonl").exists()


def test_counts_in_words():
    assert in_words(4, ["first", "tie", "first"]) == "4 pairs, 1 blank or equal; first 2, second 0, tie 1, skip 0"
