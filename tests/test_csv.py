"""``tether csv``: the metrics of runs as one table."""

from __future__ import annotations

import csv
import io

import pytest

from commandline import tether, write_rows
from tether.looking.csv import as_csv


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs whose rows have different metrics."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "a": [{"step": 1.0, "reward": 0.1}, {"step": 2.0, "reward": -1e-07, "eval/reward": 0.5}],
        "b,c": [{"step": 1.0, "kl": 2.0, "reward": 3.0}],
    }
    for name, one in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("format: 3\n")
        write_rows(tmp_path / name / "metrics.jsonl", one)
    return rows


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_one_run(runs, capsys):
    assert tether("csv a") == 0
    assert capsys.readouterr().out == "step,reward,eval/reward\n1,0.1,\n2,-1e-07,0.5\n"


def test_several_runs_have_the_union_of_columns_and_each_row_its_run(runs, capsys):
    assert tether("csv", "a", "b,c") == 0
    found = parsed(capsys.readouterr().out)
    assert list(found[0]) == ["run", "step", "reward", "eval/reward", "kl"]
    expected = [(name, row) for name, rows in runs.items() for row in rows]
    for line, (name, row) in zip(found, expected, strict=True):
        assert line.pop("run") == name
        assert {key: float(value) for key, value in line.items() if value} == row


def test_a_file(runs, tmp_path, capsys):
    assert tether("csv a --out a.csv") == 0
    assert capsys.readouterr().out == "a.csv\n"
    assert len(parsed((tmp_path / "a.csv").read_text())) == 2


def test_no_run(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert tether("csv a empty --out a.csv") == 2
    assert "not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_a_run_without_rows(runs, tmp_path, capsys):
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert tether("csv a b,c") == 0
    assert [line["run"] for line in parsed(capsys.readouterr().out)] == ["b,c"]


def test_a_reader_that_has_seen_enough(runs, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert tether("csv a") == 0


def test_names_cannot_command_a_terminal():
    assert "\x1b" not in as_csv([("a", [{"rewards/\x1b[31m": 1.0}]), ("\x1b]0;x\x07", [{"step": 1.0}])])
