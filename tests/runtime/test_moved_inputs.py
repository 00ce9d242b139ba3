"""A run can be resumed from anywhere and on another day: what its inputs hold counts, not where they are."""

from __future__ import annotations

import datetime
import errno
import os
from pathlib import Path

import pytest
import yaml

from commandline import read_rows, tether, untimed, workspace
from tether.errors import RunError
from tether.runtime import lock, locking
from tether.runtime.changes import changes, placeless
from tether.training.inputs import (
    absolute,
    absolute_reward,
    absolute_rewards,
    asks_for_the_date,
    at_moment,
    fix_the_date,
    located,
)
from tiny import byte_tokenizer, make_model

STEPS = "--steps 1 --prompts-per-step 2 --group-size 2 --max-new-tokens 3 --keep-checkpoints --quiet"
MORE = "--steps 2 --allow"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


@pytest.fixture
def run(here):
    """A run of one step, whose inputs were given by relative paths."""
    make_model(here / "m")
    assert (
        tether(f"grpo --model m --prompts ./p.jsonl --reward r.py:fn --reward short:=length:3=0.1 --out o {STEPS}") == 0
    )
    return here / "o"


def complaint(capfd, line: str) -> str:
    capfd.readouterr()
    assert tether(line) == 2
    (said,) = capfd.readouterr().err.splitlines()
    return said


def test_a_run_can_be_resumed_from_another_directory(run, here, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == str(here / "m")
    assert config["prompts"] == str(here / "p.jsonl")
    assert config["reward"] == [f"{here}/r.py:fn", "short:=length:3=0.1"]
    assert config["out"] == str(run)
    monkeypatch.chdir(here / "elsewhere")
    assert tether(f"resume ../o {MORE}") == 0
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]


def test_inputs_may_move_and_keep_what_they_hold(run, here, monkeypatch, capfd):
    place = here / "elsewhere"
    for name in ("m", "p.jsonl", "r.py"):
        (here / name).rename(place / name)
    said = complaint(capfd, f"resume o {MORE}")
    assert f"{here}/m: does not exist any more" in said
    assert "--model and its new place" in said
    said = complaint(capfd, f"resume o {MORE} --model elsewhere/m")
    assert f"{here}/p.jsonl: does not exist any more" in said
    moved = "--model elsewhere/m --prompts elsewhere/p.jsonl --reward elsewhere/r.py:fn --reward short:=length:3=0.1"
    assert tether(f"resume o {MORE} {moved}") == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"], config["prompts"]) == (str(place / "m"), str(place / "p.jsonl"))
    monkeypatch.chdir(place)
    assert tether("resume ../o --steps 3 --allow") == 0  # the new places are in config.yaml


def test_moved_inputs_need_no_leave_and_other_ones_get_none(run, here, capfd):
    (here / "other.jsonl").write_text((here / "p.jsonl").read_text().replace("Word", "World"))
    (here / "copy.jsonl").write_text((here / "p.jsonl").read_text())
    (run / "summary.json").unlink()  # as if it had been stopped
    said = complaint(capfd, "resume o --prompts other.jsonl")
    assert f"{here}/other.jsonl: prompts is not what it was when the run began" in said
    assert tether("resume o --prompts copy.jsonl") == 0
    said = complaint(capfd, f"resume o {MORE} --reward r.py:fn --reward short:=length:4=0.1")
    assert "reward" in said
    assert "cannot change" in said


def test_an_unfinished_run_continues_with_the_date_it_began_on(here, tiny, monkeypatch):
    """The template prints the time to the second; the resumed run reads the prompts that the run began with."""
    model = Path(make_model(here / "dated", template=True))
    template = "{{ strftime_now('%H:%M:%S %f') }}" + byte_tokenizer(template=True).chat_template
    (model / "chat_template.jinja").write_text(template)
    (here / "p.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n' * 2)
    assert tether(f"grpo --model dated --prompts p.jsonl --reward r.py:fn --out o {STEPS}") == 0
    assert tether(f"resume o {MORE}") == 0
    assert (model / "chat_template.jinja").read_text() == template
    for saved in (here / "o").rglob("chat_template.jinja"):
        assert saved.read_text() == template
    import pyarrow.parquet

    files = sorted((here / "o" / "rollouts").iterdir())
    assert len({row["prompt"] for file in files for row in pyarrow.parquet.read_table(file).to_pylist()}) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        '{%- if strftime_now is defined %}{%- set d = strftime_now("%d %b %Y") %}{% endif %}{{ d }}',
        "{% macro m() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ m() }}",
        "{% for x in messages %}{{ strftime_now('%d %b %Y') | trim }}{% endfor %}",
        "\n{% if true %}\n{{ strftime_now('%d %b %Y') }}\n{% endif %}",
    ],
)
def test_a_template_is_given_the_date_that_was_fixed(template):
    turns = [{"role": "user", "content": "a"}]
    fixed, plain = byte_tokenizer(template=True), byte_tokenizer(template=True)
    fixed.chat_template = template
    assert asks_for_the_date(fixed)
    assert not asks_for_the_date(plain)
    fix_the_date(fixed, "2020-02-03T04:05:06")
    plain.chat_template = template.replace("strftime_now('%d %b %Y')", "'03 Feb 2020'").replace(
        'strftime_now("%d %b %Y")', "'03 Feb 2020'"
    )
    assert fixed.apply_chat_template(turns, tokenize=False) == plain.apply_chat_template(turns, tokenize=False)
    assert fixed.chat_template == template


def test_a_date_in_an_unknown_format_is_an_error_and_no_gap():
    tokenizer = byte_tokenizer(template=True)
    tokenizer.chat_template = at_moment("{{ strftime_now('%' ~ 'Y') }}", datetime.datetime(2020, 1, 1))
    with pytest.raises(Exception, match="a date in a format"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_paths_and_what_is_none(here):
    (here / "ds").mkdir()
    (here / "base").mkdir()
    (here / "owner").mkdir()
    (here / "owner" / "model").mkdir()
    for value in ("", "base", "hub/model", "hub/data:train", "missing.jsonl", "length:3", "/abs/missing"):
        assert absolute(value, here) == value
    for value, path in {
        "p.jsonl": here / "p.jsonl",
        "./p.jsonl": here / "p.jsonl",
        "ds:test": f"{here}/ds:test",
        "ds:test[:3]": f"{here}/ds:test[:3]",
        "owner/model": here / "owner" / "model",
        str(here / "ds"): here / "ds",
    }.items():
        assert absolute(value, here) == str(path)
    for value, whole in {
        "r.py:fn=0.5": f"{here}/r.py:fn=0.5",
        "a:=r.py:fn=0.5": f"a:={here}/r.py:fn=0.5",
        "ds": f"{here}/ds",
        "ds=2": f"{here}/ds=2",
        "format:^a=b": "format:^a=b",
        "json_schema:s.json=0.5": f"json_schema:{here}/s.json=0.5",
        "a:=json_schema:/abs/s.json": "a:=json_schema:/abs/s.json",
        "json_schema": "json_schema",
        "length:40=0.1": "length:40=0.1",
        "package.module:fn": "package.module:fn",
        "owner/judge": "owner/judge",
    }.items():
        assert absolute_reward(value, here) == whole
    same = ["r.py:fn", "q.py:fn=2", "n:=q.py:fn", "length:3"]
    assert absolute_rewards(same, here) == ["r.py:fn", "q.py:fn=2", f"n:={here}/q.py:fn", "length:3"]
    assert located({"model": "ds", "eval_data": None, "kl_coef": 0.1, "out": "o"}, here) == {
        "model": f"{here}/ds", "eval_data": None, "kl_coef": 0.1, "out": f"{here}/o"
    }  # fmt: skip


def test_only_the_place_of_an_input_may_differ():
    old = {"model": "/a/m", "eval_data": None, "reward": ["/a/r.py:fn=0.5", "/a/judge/model"], "seed": 1}
    assert changes(old, {**old, "model": "/b/m", "reward": ["/b/r.py:fn=0.5", "/b/judge/model"]}) == []
    assert changes(old, {**old, "eval_data": "/b/e"}) == ["eval_data"]
    for other in (["/a/r.py:fn", "/a/judge/model"], ["/a/r.py:gn=0.5", "/a/judge/model"], ["/a/r.py:fn=0.5"]):
        assert changes(old, {**old, "reward": other}) == ["reward"]
    assert placeless("n:=/x/q.py:fn=2") == ("n", "q.py:fn", 2.0)
    assert placeless("json_schema:/x/s.json=2") == (None, "json_schema:s.json", 2.0)


def test_a_reward_that_changes_the_directory_moves_nothing(here, tiny, monkeypatch):
    body = (here / "r.py").read_text()
    (here / "r.py").write_text(f"import os\nos.chdir({str(here / 'elsewhere')!r})\n{body}")
    (here / "second.py").write_text(body)
    line = f"grpo --model {tiny} --prompts p.jsonl --eval-prompts held_prompts.jsonl --out o {STEPS}"
    assert tether(f"{line} --reward r.py:fn --reward other:=second.py:fn") == 0
    assert (here / "o" / "summary.json").is_file()
    assert not list((here / "elsewhere").iterdir())
    monkeypatch.chdir(here)
    assert tether(f"resume o {MORE}") == 0
    assert len(untimed(read_rows(here / "o" / "metrics.jsonl"))) == 2


def test_a_directory_that_was_removed_is_one_line(run, here, tiny, monkeypatch, capfd):
    monkeypatch.chdir(here / "elsewhere")
    os.rmdir(here / "elsewhere")
    assert "working directory does not exist" in complaint(capfd, f"resume {run.absolute()}")
    assert "working directory does not exist" in complaint(capfd, f"sft --model {tiny} --data x.jsonl --out {here}/o")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_one_line(number, run, here, monkeypatch, capfd):
    def take(_):
        raise OSError(number, os.strerror(number))

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(locking, "take", take)
    with pytest.raises(RunError):
        lock.Lock(run)
    for line in (f"resume o {MORE}", f"grpo --model m --prompts p.jsonl --reward r.py:fn --out new {STEPS}"):
        said = complaint(capfd, line)
        assert os.strerror(number) in said
        assert ("another file system" in said) == (number != errno.EIO)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert not (here / "new").exists()


def test_a_run_directory_in_place_of_a_model_is_told_apart(run, here, capfd):
    (here / "empty").mkdir()
    (here / "empty" / "config.yaml").write_text("format: 2\ncommand: grpo\n")
    lines = {
        "generate --model o --prompts p.jsonl": "o/model",
        "generate --model empty --prompts p.jsonl": "has no model yet",
        f"grpo --model o --prompts p.jsonl --reward r.py:fn --out new {STEPS}": "o/model",
        f"grpo --model m --prompts p.jsonl --reward o --out new {STEPS}": "o/model",
        "reward --model o --pairs pairs.jsonl --out new": "o/model",
        "eval --reward-model o --pairs pairs.jsonl": "o/model",
        "eval --model m --prompts p.jsonl --reward length:2 --reference o": "o/model",
    }
    for line, says in lines.items():
        said = complaint(capfd, line)
        assert "this is a run directory" in said
        assert says in said
    assert not (here / "new").exists()
