"""The page of a run: one file that needs nothing else, with what the run left in it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from commandline import tether, workspace, write_rows
from tether.errors import ConfigError, RunError
from tether.observers import Alarm
from tether.report.comparison import differing_options
from tether.report.held_out import read_candidates
from tether.report.page import alarms, legend, plots, samples, side_by_side, table, whole_page
from tether.report.panels import panels_of
from tether.report.plots import COLOURS, Panel, Series, figure, series_of, svg
from tether.report.several import frontier, last_figures
from tether.report.style import SCRIPT
from tether.report.view import EVALUATED, RunView, run_names

TASK = "--prompts p.jsonl --reward r.py:fn --reward length:3=0.5 --max-new-tokens 4 --quiet"
TRAINING = {
    "sft": "sft --data texts.jsonl --eval-data held_texts.jsonl --batch-size 4 --quiet",
    "reward": "reward --pairs pairs.jsonl --batch-size 8 --quiet",
    "rejection-sampling": f"rejection-sampling {TASK} --group-size 3",
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
    assert page.count("<script") == page.count(f"<script>{SCRIPT}</script>") == 1
    own = re.sub(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)/", "", page)  # the names of XML vocabularies
    assert not re.search(r"""(src|href)=["'](?!#)""", own)
    assert "http" not in own.replace("http-equiv", "")


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("command: ppo\nmodel: m\n")
    assert tether("report", tmp_path) == 0
    assert "no metrics yet" in (tmp_path / "report.html").read_text()


def test_text_cannot_become_markup():
    hostile = "<script>alert('a&b')</script>"
    parts = [table([hostile], [[hostile]]), samples([(hostile,) * 3]), side_by_side(hostile, [(hostile, hostile)])]
    parts += [
        alarms([(1, Alarm(monitor=hostile, message=hostile, advice=hostile, examples=(hostile,), phrase=hostile))]),
        legend([Panel(title="", x_label="", y_label="", series=[curve(hostile)])]),
    ]
    page = whole_page(hostile, hostile, *parts).decode()
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;alert(&#x27;a&amp;b&#x27;)&lt;/script&gt;") == 3 + 2 + 3 + 3 + 4 + 1


def curve(label: str) -> Series:
    return Series(label=label, x=[1], y=[2], colour=COLOURS[0])


def a_run(path: Path, rows=(), *, evaluation=None, **config) -> Path:
    """A run directory with these metrics and options."""
    path.mkdir(parents=True)
    options = {"command": "grpo", "out": str(path), **config}
    (path / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    write_rows(path / "metrics.jsonl", list(rows))
    if evaluation is not None:
        (path / "summary.json").write_text(json.dumps({"evaluation": evaluation}))
    return path


def rollouts(path: Path, *, step: int, scores) -> None:
    import pyarrow
    import pyarrow.parquet

    (path / "rollouts").mkdir(exist_ok=True)
    rows = [
        {"prompt": "p", "completion": f"c{i}", "score": float(score), "finish_reason": "eos", "mask": [True]}
        for i, score in enumerate(scores)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "rollouts" / f"step_{step:06d}.parquet")


def figures(**given: float) -> dict[str, float]:
    """One model's held-out evaluation."""
    return dict.fromkeys(EVALUATED, 0.5) | given


def test_a_view_holds_what_the_run_left(tmp_path):
    run = a_run(
        tmp_path / "run",
        [{"step": 1.0, "reward": 0.1, "rewards/b/mean": 1.0}, {"step": 2.0, "rewards/a/mean": 0.0}],
        evaluation={"policy": {**figures(kl=2.0), "prompts": 3}},
        seed=7,
    )
    rollouts(run, step=1, scores=range(100, 120))
    rollouts(run, step=2, scores=range(20))
    view = RunView.read(run)
    assert (view.name, view.command, view.config["seed"], len(view.rows)) == ("run", "grpo", 7, 2)
    assert view.reward_parts == ["rewards/a/mean", "rewards/b/mean"]
    assert (view.last("reward"), view.last("step"), view.last("kl")) == (0.1, 2.0, None)
    assert view.evaluation == {"policy": figures(kl=2.0)}
    assert [sample.score for sample in view.samples] == [float(score) for score in reversed(range(20))]
    assert [sample.completion for sample in view.best_and_worst(4)] == ["c19", "c18", "c1", "c0"]
    assert view.best_and_worst(20) == view.samples
    assert [sample.score for sample in view.first_samples] == [float(score) for score in reversed(range(100, 120))]


def test_a_view_of_a_run_that_has_only_begun_is_empty(tmp_path):
    view = RunView.read(a_run(tmp_path / "run"))
    assert (view.rows, view.summary, view.evaluation, view.samples) == ([], {}, {}, [])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", "garbage"),
        ("summary.json", "[1]"),
        ("summary.json", '{"evaluation": {"policy": {"reward": 1.0}}}'),
        ("rollouts/step_000001.parquet", "garbage"),
    ],
)
def test_the_error_of_a_view_says_which_file_is_at_fault(file, content, tmp_path):
    run = a_run(tmp_path / "run")
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(content)
    with pytest.raises(RunError) as found:
        RunView.read(run)
    assert str(found.value).startswith(str(run / file))


def test_a_directory_that_is_no_run_has_no_view(tmp_path):
    with pytest.raises(RunError, match="not a run"):
        RunView.read(tmp_path)


def test_one_run_has_a_panel_per_kind_of_metric(tmp_path):
    rows = [{"step": 1.0, "reward": 0.1, "rewards/a/mean": 1.0}, {"step": 2.0, "reward": 0.3, "eval/accuracy": 0.7}]
    panels = {panel.title: panel for panel in panels_of([RunView.read(a_run(tmp_path / "run", rows))])}
    assert panels.keys() == {"Reward", "Parts of the reward", "Accuracy"}
    (reward,) = panels["Reward"].series
    assert (reward.label, list(reward.x), list(reward.y)) == ("reward", [1.0, 2.0], [0.1, 0.3])
    (accuracy,) = panels["Accuracy"].series  # measured at the second step alone
    assert (list(accuracy.x), list(accuracy.y)) == ([2.0], [0.7])


def three_runs(tmp_path: Path) -> list[Path]:
    """One that began only, and two that share metrics."""
    steps = [{"step": 1.0, "kl": 0.0, "reward": 0.1, "loss": 3.0}, {"step": 2.0, "kl": 0.5, "reward": 0.4, "loss": 2.0}]
    held_out = {"reference": figures(), "policy": figures(kl=1.5, reward=0.75, reward_ci95=0.25)}
    return [
        a_run(tmp_path / "a", steps[:1], seed=0, kl_coef=0.1),
        a_run(tmp_path / "b", [{**row, "loss/value": 1.0} for row in steps], seed=0, kl_coef=0.2, lam=0.95),
        a_run(tmp_path / "c", steps, seed=0, kl_coef=0.2, evaluation=held_out),
    ]


def read_runs(paths):
    return [RunView.read(path, name=name) for path, name in zip(paths, run_names(paths), strict=True)]


def test_several_runs_have_a_panel_per_metric_with_a_curve_per_run(tmp_path):
    panels = {panel.title: panel for panel in panels_of(read_runs(three_runs(tmp_path)))}
    assert list(panels) == ["Reward", "KL to the reference, nats per completion", "loss", "loss/value"]
    for title in ("Reward", "loss"):
        assert [(one.label, one.colour) for one in panels[title].series] == list(zip("abc", COLOURS, strict=False))
    assert [list(one.y) for one in panels["Reward"].series] == [[0.1], [0.1, 0.4], [0.1, 0.4]]
    assert [one.label for one in panels["loss/value"].series] == ["b"]


def test_reward_against_kl_shows_training_and_the_held_out_policy(tmp_path):
    candidates = read_candidates(three_runs(tmp_path))
    panel = frontier(candidates, "score")
    assert [(one.label, list(one.x), list(one.y), one.points) for one in panel.series] == [
        ("b, training", [0.0, 0.5], [0.1, 0.4], False),  # a has one row, which is no path
        ("c, training", [0.0, 0.5], [0.1, 0.4], False),
        ("c", [1.5], [0.75], True),
    ]
    assert (panel.series[-1].colour, panel.series[-1].error) == (COLOURS[2], [0.25])


def test_one_legend_names_each_run_once(tmp_path):
    panels = panels_of(read_runs(three_runs(tmp_path)))
    assert re.findall("</i>([a-z])</span>", legend(panels)) == ["a", "b", "c"]
    assert not [axis for axis in figure(panels, legend=False).axes if axis.get_legend()]
    assert "a</span>" in plots(panels, "caption", one_legend=True)
    assert "a</span>" not in plots(panels, "caption")


def test_a_curve_of_one_row_is_a_point_and_steps_are_whole(tmp_path):
    (axis, *_) = figure(panels_of(read_runs(three_runs(tmp_path)))).axes
    assert [line.get_marker() for line in axis.get_lines()] == ["o", "None", "None"]
    assert all(tick == round(tick) for tick in axis.get_xticks())


def test_sizes_begin_at_zero_and_rewards_do_not(tmp_path):
    rows = [{"step": float(i), "kl": 5.0 + i, "reward": 5.0 + i} for i in range(4)]
    reward, kl = figure(panels_of([RunView.read(a_run(tmp_path / "run", rows))])).axes
    assert kl.get_ylim()[0] == 0.0
    assert reward.get_ylim()[0] > 4.0
    below = Panel(title="", x_label="", y_label="", series=[Series(label="", x=[0], y=[-1.0], colour="k")], y_from=0.0)
    assert figure([below]).axes[0].get_ylim()[0] < -1.0


def test_the_tables_of_several_runs(tmp_path):
    views = read_runs(three_runs(tmp_path))
    assert differing_options(views) == [["kl_coef", "0.1", "0.2", "0.2"], ["lam", "–", "0.95", "–"]]
    assert last_figures(views) == [
        ["step", "1", "2", "2"],
        ["reward", "0.1", "0.4", "0.4"],
        ["kl", "0", "0.5", "0.5"],
        ["loss", "3", "2", "2"],
        ["loss/value", "–", "1", "–"],
    ]


def test_several_runs_make_one_page(tmp_path, capsys):
    runs = three_runs(tmp_path)
    rollouts(runs[1], step=2, scores=[1, 2])
    assert tether("report", *runs, "--out", tmp_path / "all.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    for part in (
        "<h1>tether: 3 runs</h1>",
        "Options that differ",
        "0.75 ± 0.25",
        "Last figures",
        "<svg",
        "Samples of b",
    ):
        assert part in page
    assert "Samples of a" not in page
    assert not [run for run in runs if (run / "report.html").exists()]


def test_several_runs_that_have_only_begun_have_a_page(tmp_path):
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b")]
    assert tether("report", *runs, "--out", tmp_path / "all.html") == 0
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "All options are the same." in page
    assert "no metrics yet" in page


def test_one_run_can_have_its_page_elsewhere(tmp_path):
    run = a_run(tmp_path / "run")
    assert tether("report", run, "--out", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").exists()
    assert not (run / "report.html").exists()


def test_several_runs_need_a_file_to_write(tmp_path, capsys):
    runs = three_runs(tmp_path)
    assert tether("report", *runs) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--out FILE" in said
    assert tether("report", *runs, "--out", tmp_path) == 2
    assert "is a directory" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(Path("x/ppo"))
    a_run(Path("y/ppo"))
    assert run_names([Path("x/ppo"), Path("y/ppo")]) == ["x/ppo", "y/ppo"]
    assert run_names([Path("x/ppo")]) == ["ppo"]
    with pytest.raises(ConfigError, match="x/ppo: given twice"):
        run_names([Path("x/ppo"), Path("./x/ppo")])


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
    first, second = svg(panel), svg(panel)
    assert first == second
    assert first.startswith("<svg")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("command: ppo\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1.0, "reward": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tether("report", tmp_path) == 2
    assert "tether-rlhf[report]" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
