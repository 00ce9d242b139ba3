"""The page of a run: one file that needs nothing else, with what the run left in it."""

from __future__ import annotations

import re
import sys

import pytest

from commandline import tether, workspace
from tether.report.page import samples, table, write_page
from tether.report.plots import COLOURS, Panel, Series, series_of, svg
from tether.report.run import last_samples, panels_of

TASK = "--prompts p.jsonl --reward r.py:fn --reward length:3=0.5 --max-new-tokens 4 --quiet"
TRAINING = {
    "sft": "sft --data texts.jsonl --eval-data held_texts.jsonl --batch-size 4 --quiet",
    "reward": "reward --pairs pairs.jsonl --batch-size 8 --quiet",
    "rejection-sampling": f"rejection-sampling {TASK} --samples-per-prompt 3",
    "grpo": f"grpo {TASK} --group-size 2 --steps 3 --prompts-per-step 2 --eval-prompts held_prompts.jsonl",
}
SHOWS = {
    "sft": ("Loss", "Gradient norm"),
    "reward": ("Accuracy", "Loss"),
    "rejection-sampling": ("Reward", "Samples of the last rollouts"),
    "grpo": ("Parts of the reward", "KL to the reference", "On held-out prompts", "win_rate", "Samples of the last"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_the_report_of_a_run(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    assert tether(f"{TRAINING[name]} --out out --model", tiny) == 0
    assert tether("report out") == 0
    assert capsys.readouterr().out.strip() == "out/report.html"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for part in (f"<h1>tether {name}</h1>", "Configuration", "<svg", "learning_rate", *SHOWS[name]):
        assert part in page
    assert "<script" not in page
    own = re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)/", "", page)  # the names of XML vocabularies
    assert not re.search(r"""(src|href)=["'](?!#)""", own)
    assert "http" not in own.replace("https://matplotlib.org/", "")


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("command: ppo\nmodel: m\n")
    assert tether("report", tmp_path) == 0
    assert "no metrics yet" in (tmp_path / "report.html").read_text()


def test_text_cannot_become_markup(tmp_path):
    hostile = "<script>alert('a&b')</script>"
    write_page(tmp_path / "r.html", hostile, hostile, table([hostile], [[hostile]]), samples([(hostile,) * 3]))
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;a&amp;b&#x27;)&lt;/script&gt;") == 3 + 2 + 3


def test_panels_hold_what_the_rows_hold():
    rows = [{"step": 1.0, "reward": 0.1, "rewards/a/mean": 1.0}, {"step": 2.0, "reward": 0.3, "eval/accuracy": 0.7}]
    panels = {panel.title: panel for panel in panels_of(rows)}
    assert panels.keys() == {"Reward", "Parts of the reward", "Accuracy"}
    (reward,) = panels["Reward"].series
    assert (list(reward.x), list(reward.y)) == ([1.0, 2.0], [0.1, 0.3])
    (accuracy,) = panels["Accuracy"].series  # measured at the second step alone
    assert (list(accuracy.x), list(accuracy.y)) == ([2.0], [0.7])


def test_a_series_can_run_over_another_metric():
    rows = [{"step": 1.0, "kl": 0.5, "reward": 0.1}, {"step": 2.0, "reward": 0.3}]
    assert list(series_of(rows, "reward", label="r", colour=COLOURS[0], x="kl").x) == [0.5]


def test_the_same_figures_give_the_same_file():
    panel = Panel(
        title="Gold",
        x_label="KL",
        y_label="",
        series=[
            Series(label="path", x=[0, 1], y=[0, 1], colour=COLOURS[0], dashed=True),
            Series(label="end", x=[1], y=[1], colour=COLOURS[1], points=True, error=[0.1]),
        ],
    )
    first, second = svg([panel]), svg([panel])
    assert first == second
    assert first.startswith("<svg")


def test_samples_are_the_best_and_the_worst_of_the_last_rollouts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rollouts").mkdir()
    for step, offset in ((1, 100), (2, 0)):
        rows = [{"prompt": "p", "completion": f"c{i}", "score": float(i + offset)} for i in range(20)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rollouts" / f"step_{step:06d}.parquet")
    shown = last_samples(tmp_path, most=4)
    assert shown == [("+19.00", "p", "c19"), ("+18.00", "p", "c18"), ("+1.00", "p", "c1"), ("+0.00", "p", "c0")]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("command: ppo\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1.0, "reward": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tether("report", tmp_path) == 2
    assert "tether-rlhf[report]" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
