"""What a run shows of itself, in Python and in a notebook."""

from __future__ import annotations

import json

import pytest

import tether
from commandline import write_rows


@pytest.fixture
def run(tmp_path):
    """A run directory that no command made."""
    path = tmp_path / "a<b>"
    (path / "rollouts").mkdir(parents=True)
    (path / "config.yaml").write_text("format: 3\ncommand: grpo\nkl_coef: 0.1\ndtype: float32\ndevice: cpu\n")
    write_rows(
        path / "metrics.jsonl",
        [{"step": 1.0, "reward": 0.5, "kl": 0.0}, {"step": 2.0, "reward": 0.75, "kl": 1.5, "loss": 0.5}],
    )
    figures = {"reward": 0.7, "reward_ci95": 0.1, "kl": 1.0, "win_rate": 0.6, "mean_length": 3.0, "distinct_2": 1.0}
    (path / "summary.json").write_text(json.dumps({"ended": "<why>", "evaluation": {"policy": figures}}))
    import pyarrow
    import pyarrow.parquet

    scores = [0.0, 4.0, 1.0, 3.0, 2.0, None]
    texts = {"prompt": ["p"] * 6, "completion": [f"c{s}" for s in scores], "finish_reason": ["eos"] * 6}
    table = pyarrow.table({**texts, "score": scores, "mask": [[True]] * 6})
    pyarrow.parquet.write_table(table, path / "rollouts" / "step_000002.parquet")
    return tether.Run(path)


def test_what_it_holds(run):
    assert run.command == "grpo"
    assert run.options == {"kl_coef": 0.1, "dtype": "float32", "device": "cpu"}
    assert [row["reward"] for row in run.metrics] == [0.5, 0.75]
    assert run.evaluation["policy"]["win_rate"] == 0.6
    with pytest.raises(tether.RunError, match="the run has no model yet"):
        _ = run.model


def test_samples_are_evenly_spaced_from_the_best_to_the_worst(run):
    assert [one.score for one in run.samples(5)] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert [one.score for one in run.samples(3)] == [4.0, 2.0, 0.0]
    assert [one.score for one in run.samples(1)] == [4.0]
    assert len(run.samples(100)) == 5


def test_a_notebook_shows_a_table_in_which_nothing_is_markup(run):
    shown = run._repr_html_()
    assert "&lt;why&gt;" in shown
    assert "a&lt;b&gt;" in shown
    assert "0.7 ± 0.1" in shown
    assert "loss" not in shown  # that of a policy says nothing
    assert "<why>" not in shown


def test_a_figure(run):
    pytest.importorskip("matplotlib")
    figure = run.plot("reward", "kl")
    assert [axes.get_title() for axes in figure.axes] == ["reward", "kl"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [0.0, 1.5]
    assert len(run.plot().axes) >= 2
    with pytest.raises(tether.ConfigError, match="the run has no metric 'rewrad'"):
        run.plot("rewrad")


def test_a_data_frame(run):
    pytest.importorskip("pandas")
    assert run.frame()["reward"].tolist() == [0.5, 0.75]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(tether.RunError, match="not a run directory"):
        tether.Run(tmp_path)


def test_a_copy_overwrites_nothing(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(tether.RunError, match="exists already"):
        run.save(tmp_path / "there")
    assert run.save(tmp_path / "new").metrics == run.metrics
