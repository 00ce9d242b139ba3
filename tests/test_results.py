"""What commands print and write is valid JSON with all that was asked for, whatever the data and the terminal are."""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest

from commandline import contents, read_rows, tether, write_rows
from helpers import group, scored
from tether.cli import run
from tether.runtime.directory import RunDirectory, rollout_table
from tether.runtime.json_text import to_json
from tether.types import Score, ScoredGroup

NAN, INFINITY = float("nan"), float("inf")
GENERATE = "generate --prompts p.parquet --max-new-tokens 3 --model"


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def strict(text: str):
    """``text`` as JSON by the standard, which has no NaN and no Infinity."""
    return json.loads(text, parse_constant=refuse_constant)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prompts(here: Path, **columns: list) -> None:
    """Two prompts with these columns."""
    table = pyarrow.table({"prompt": ["é", "日本"], **columns})
    pyarrow.parquet.write_table(table, here / "p.parquet")


def printed(monkeypatch, encoding: str, *arguments: object) -> tuple[object, bytes]:
    """Exit code and output of the process's entry point, where the standard output has this encoding."""
    raw, (name, _, errors) = io.BytesIO(), encoding.partition(":")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=name, errors=errors or "strict"))
    monkeypatch.setattr(sys, "argv", ["tether", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run()
    sys.stdout.flush()
    return end.value.code, raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:surrogateescape", "ascii:replace"])
def test_what_the_terminal_cannot_show_is_escaped(encoding, here, tiny, monkeypatch):
    prompts(here)
    code, output = printed(monkeypatch, encoding, *GENERATE.split(), tiny)
    assert code == 0
    rows = [strict(line) for line in output.decode(encoding.partition(":")[0]).splitlines()]
    assert [row["prompt"] for row in rows] == (["?", "??"] if "replace" in encoding else ["é", "日本"])


def test_the_c_locale_is_enough(here, tiny):
    prompts(here)
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", *GENERATE.split(), tiny],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert [strict(line)["prompt"] for line in done.stdout.decode("ascii").splitlines()] == ["é", "日本"]


def test_a_full_standard_output_is_one_line(here, tiny):
    prompts(here)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tether.cli", *GENERATE.split(), tiny],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.stderr == b"tether generate: standard output: cannot be written (No space left on device)\n"
    assert done.returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(here, tiny):
    prompts(here)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "tether.cli", *GENERATE.split(), tiny],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("out", ["file", "terminal"])
def test_numbers_that_json_lacks_are_null(out, here, tiny, capfd):
    prompts(here, low=[-INFINITY, 1.5], deep=[{"a": [NAN, 1.0]}, {"a": []}], day=[datetime.date(2026, 1, 2)] * 2)
    if out == "file":
        assert tether(GENERATE, tiny, "--out", "c.jsonl") == 0
        text = (here / "c.jsonl").read_text(encoding="utf-8")
    else:
        assert tether(GENERATE, tiny) == 0
        text = capfd.readouterr().out
    first, second = map(strict, text.splitlines())
    assert (first["low"], first["deep"], second["low"]) == (None, {"a": [None, 1.0]}, 1.5)
    assert first["day"] == "datetime.date(2026, 1, 2)"


def test_skipped_rows_are_valid_json(here, tiny):
    """JSON that Python alone reads is read, and written as JSON that everything reads."""
    (here / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": " ", "x": NaN, "y": [-Infinity]}\n')
    (here / "r.py").write_text("def fn(completions, **_):\n    return [0.0] * len(completions)\n")
    line = "grpo --prompts p.jsonl --reward r.py:fn --steps 1 --prompts-per-step 1 --group-size 2 --max-new-tokens 2"
    assert tether(f"{line} --on-bad-rows skip --out out --model", tiny) == 0
    (skipped,) = [strict(text) for text in (here / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped["row"] == {"prompt": " ", "x": None, "y": [None]}
    for file in (here / "out").rglob("*.json"):
        strict(file.read_text())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": NAN}, '{"a": null}'),
        ([1, [INFINITY, -INFINITY]], "[1, [null, null]]"),
        ({NAN: 1}, '{"nan": 1}'),
        ((1.5, "NaN"), '[1.5, "NaN"]'),
        ({"é": 1e308}, '{"é": 1e+308}'),
        ({"a": NAN, "b": b"x"}, '{"a": null, "b": "b\'x\'"}'),
    ],
)
def test_json_text(value, text):
    assert to_json(value) == text
    strict(text)


def test_every_file_of_a_run_is_valid_json(tmp_path):
    directory = RunDirectory(tmp_path / "run", {"command": "grpo"}, data=[{"a": NAN}], skipped=[{"row": {"a": NAN}}])
    with directory:
        directory.log({"step": 1.0})
        directory.append("selected.jsonl", [{"score": NAN}])
        directory.summary({"a": [NAN]})
    for file in (*directory.path.glob("*.json"), *directory.path.glob("*.jsonl")):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            strict(line)


def test_columns_with_the_name_of_a_result_are_kept(here, tiny):
    prompts(here, completion=["own", "own too"], tokens=[5, 6], finish_reason=["a", "b"], answer=["1", "2"])
    assert tether(GENERATE, tiny, "--out", "c.jsonl") == 0
    rows = read_rows(here / "c.jsonl")
    assert [row["data/completion"] for row in rows] == ["own", "own too"]
    assert [(row["data/tokens"], row["data/finish_reason"]) for row in rows] == [(5, "a"), (6, "b")]
    assert [row["answer"] for row in rows] == ["1", "2"]
    assert all(row["completion"] != row["data/completion"] and row["tokens"] <= 3 for row in rows)


def test_columns_that_would_have_one_name_are_refused_before_the_work(here, tiny, capfd):
    write_rows(here / "p.jsonl", [{"prompt": "a", "tokens": 1}, {"prompt": "b", "data/tokens": 2}])
    before = contents(here)
    assert tether(f"generate --prompts p.jsonl --out c.jsonl --max-new-tokens 9 --model {tiny}") == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert all(part in said for part in ("p.jsonl", "'tokens'", "'data/tokens'"))
    assert contents(here) == before


@pytest.mark.parametrize("command", ["generate --prompts p.parquet", "eval --prompts p.parquet --reward length:3"])
def test_completions_that_fill_the_context_are_refused_with_what_helps(command, here, tiny, capfd):
    prompts(here)
    for number in (128, 500):
        assert tether(f"{command} --model {tiny} --max-new-tokens {number}") == 2
        (said,) = capfd.readouterr().err.splitlines()
        assert "--max-new-tokens less than 128" in said
        assert "overlong" not in said


def test_the_rollouts_of_a_run_are_one_data_set(tmp_path):
    """Also where a reward applies to nothing in one step, where all completions lack it."""
    directory = RunDirectory(tmp_path / "run", {"command": "grpo"})
    with directory:
        for step, part in enumerate((None, 1.5, None), 1):
            one = scored(group((0, 5), [(5, 1)]), [1.0])
            directory.rollouts(
                step, [ScoredGroup(rollouts=one.rollouts, scores=(Score(total=1.0, parts={"a": part}),))]
            )
    whole = pyarrow.dataset.dataset(directory.path / "rollouts").to_table()
    assert whole.column("rewards/a").to_pylist() == [None, 1.5, None]
    assert whole.column("step").to_pylist() == [1, 2, 3]
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(directory.path / "rollouts" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded["rewards/a"][:] == [None, 1.5, None]


def test_the_types_of_rollouts_do_not_depend_on_the_values():
    def schema(parts, ids):
        one = scored(group((0, 5), [ids]), [1])
        return rollout_table(1, [ScoredGroup(rollouts=one.rollouts, scores=(Score(total=1, parts=parts),))]).schema

    assert schema({"a": None, "b": 1}, (1,)) == schema({"a": 0.5, "b": None}, (7, 8, 1))
