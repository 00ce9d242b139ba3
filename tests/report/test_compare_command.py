"""``tether compare`` and ``tether report`` of several runs: on a terminal, as JSON, and as a page."""

from __future__ import annotations

import json
import re

import pytest

from commandline import tether
from evaluated import evaluated_run, flat_scores
from tether.report.panels import panels_of
from tether.report.view import RunView

BASE = flat_scores(0.0)
ROWS = [{"step": float(i), "reward": 0.1 * i, "kl": 0.5 * i, "loss": 1.0} for i in range(1, 4)]


@pytest.fixture
def two(tmp_path):
    return [
        evaluated_run(
            tmp_path / name, flat_scores(level, spread=spread), BASE, kl=level, rows=ROWS, kl_coef=0.1 * level
        )
        for name, level, spread in (("low", 1.0, 0.1), ("high", 2.0, 0.12))
    ]


def test_the_terminal_shows_the_verdict_within_80_columns(two, capsys):
    assert tether("compare", *two) == 0
    out = capsys.readouterr().out
    assert "high is better than low by 0.99" in out
    assert "--by" not in out  # the score is the only reward
    assert re.search(r"kl_coef +0.1 +0.2", out)
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def test_many_runs_fit_too(tmp_path, capsys):
    paths = [
        evaluated_run(
            tmp_path / f"a-run-with-a-long-name-{i}", flat_scores(0.1 * i, spread=0.1 + 0.01 * i), BASE, seed=i
        )
        for i in range(6)
    ]
    assert tether("compare", *paths) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "a-run-with-a-long-name-5 is better than a-run-with-a-long-name-4 by" in " ".join(out.split())


def test_json_holds_all_figures(two, capsys):
    assert tether("compare --json", *two) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figure"] == "score"
    assert [one["name"] for one in found["standings"]] == ["low", "high"]
    (pair,) = found["pairs"]
    assert pair["difference"]["low"] < pair["difference"]["value"] < pair["difference"]["high"]
    assert found["options"] == {"kl_coef": {"low": "0.1", "high": "0.2"}}
    assert found["verdict"][0].startswith("high is better")


def test_the_page_says_what_the_terminal_says(two, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert tether("compare", *two, "--out", page) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    for part in ("high is better than low", "Options that differ", "against KL", "Over the steps", "Last figures"):
        assert part in text
    assert "The first completions of the first held-out prompts" in text
    other = tmp_path / "report.html"
    assert tether("report", *two, "--out", other) == 0
    assert other.read_bytes() == page.read_bytes()


def test_the_page_of_one_run_has_the_judge_and_the_step_of_the_model(tmp_path):
    """The judge gives the policy 3 and 5, the reference 0: a mean difference of 4."""
    rows = [
        {"step": 1.0, "reward": 0.1, "kl": 1.0, "eval/reward": 0.5, "eval/rewards/judge": 2.0, "eval/kl": 1.0},
        {"step": 2.0, "reward": 0.2, "kl": 2.0, "eval/reward": 0.4, "eval/rewards/judge": 4.0, "eval/kl": 2.0},
    ]
    path = evaluated_run(
        tmp_path / "a",
        {"x": [1.0], "y": [2.0]},
        {"x": [0.0], "y": [0.0]},
        judge={"x": [3.0], "y": [5.0]},
        rows=rows,
        eval_reward=["j.py:judge"],
        keep_best="eval/rewards/judge",
    )
    (path / "summary.json").write_text(json.dumps({"best": {"step": 2, "value": 4.0, "path": "model"}}))
    assert tether("report", path) == 0
    page = (path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<td>judge \(not trained on\)</td><td>4 ± 13</td><td>0[^<]*</td><td>\+4 ± 13</td>", page)
    assert "model/ has the weights of step 2, chosen by the highest eval/rewards/judge (4)." in page
    assert "The step of a was chosen on these prompts" in page
    assert "<b>before: reference (+0.00)</b>" in page
    titles = [panel.title for panel in panels_of([RunView.read(path)])]
    assert titles[1:3] == ["Reward on held-out prompts", "Each reward on held-out prompts"]
    assert "KL on held-out prompts, nats per completion" in titles


def test_reward_model_runs_are_sent_to_their_command(tmp_path, capsys):
    paths = [evaluated_run(tmp_path / name, BASE, BASE, command="reward", reward=[]) for name in "ab"]
    assert tether("compare", *paths) == 2
    assert "tether eval --reward-model" in capsys.readouterr().err


def test_rewards_that_differ_are_warned_about_where_they_share_an_axis(tmp_path):
    a = evaluated_run(tmp_path / "a", BASE, BASE, rows=ROWS)
    b = evaluated_run(tmp_path / "b", BASE, BASE, rows=ROWS, reward=["other.py:fn"])
    assert tether("report", a, b, "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Careful: reward is not the same in all runs" in text
    assert "a: 1 * r.py:fn; b: 1 * other.py:fn" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare {two} --by beauty", "there are: score, fn"),
        ("compare {two} --json --out x.html", "one of --json and --out"),
        ("compare nowhere", "not a run directory"),
        ("compare {one} {one}", "given twice"),
    ],
)
def test_what_cannot_be_compared_is_one_line(line, said, two, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tether(line.format(one=two[0], two=" ".join(map(str, two)))) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_damaged_file_of_completions_is_named(two, capsys):
    (two[0] / "evaluation.parquet").write_bytes(b"garbage")
    assert tether("compare", *two) == 2
    assert f"{two[0]}/evaluation.parquet" in capsys.readouterr().err


def test_a_hostile_prompt_stays_text(tmp_path, capsys):
    scores = {f"<script>{i}\x1b[31m": [0.0, float(i)] for i in range(4)}
    path = evaluated_run(tmp_path / "a", scores, scores)
    assert tether("compare", path, "--out", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<script") == 1
