"""Presets: each resolves to the options of its command, and runs at toy size."""

from __future__ import annotations

import pytest
import yaml

from commandline import read_rows, tether, workspace, write_rows
from tether.commands import TABLE, find
from tether.flags import options_of, parse
from tether.presets import PRESETS
from tiny import make_model

TOY = {
    "model": "m",
    "out": "out",
    "prompts": "problems.jsonl",
    "eval_prompts": "unseen.jsonl",
    "pairs": "pairs.jsonl",
    "eval_pairs": None,
    "test_pairs": None,
    "eval_share": 0.2,
    "test_share": 0.0,
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 3,
    "eval_every": 1,
    "epochs": 0.5,
    "batch_size": 4,
    "dtype": "float32",
}
"""What takes the place of data, models and sizes, where a command has such an option."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    make_model(tmp_path / "m", template=True)
    rows = [{"question": f"What is {i} + 1?", "prompt": f"Say {i}", "answer": f"So #### {i + 1}"} for i in range(6)]
    write_rows(tmp_path / "problems.jsonl", rows)
    write_rows(tmp_path / "unseen.jsonl", [{**row, "question": f"Now {row['question']}"} for row in rows[:2]])
    return tmp_path


def flags(values):
    found = []
    for name, value in values.items():
        text = "none" if value is None else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_it_resolves_to_options_of_its_command(name):
    preset = PRESETS[name]
    command = find(preset.command, TABLE)
    cls = command.options_class()
    needed = {"out": "x", "model": "m", "prompts": "p", "pairs": "p", "reward": "length:3"}
    missing = {
        option.name: needed[option.name]
        for option in options_of(cls)
        if option.name in needed and option.name not in preset.options
    }
    found = parse(command.name, cls, [*flags(missing), "--preset", name])
    assert found.run.out == "x"
    if preset.command == "grpo":
        assert found.task.prompts == preset.options["prompts"]
        assert found.run.device.dtype == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_it_runs_two_steps_at_toy_size(name, here):
    preset = PRESETS[name]
    command = find(preset.command, TABLE)
    known = {option.name for option in options_of(command.options_class())}
    needed = known & {"model", "out", "prompts", "pairs", "steps", "prompts_per_step", "group_size", "max_new_tokens"}
    toy = {key: value for key, value in TOY.items() if key in known and (key in preset.options or key in needed)}
    toy |= {key: TOY[key] for key in known & {"eval_share", "test_share"}}
    reward = [] if preset.options.get("reward") or "reward" not in known else ["--reward", "length:3"]
    if preset.options.get("reward") == ("sentiment",):
        pytest.importorskip("vaderSentiment")
    assert tether(f"{preset.command} --quiet --preset {name}", *flags(toy), *reward) == 0
    rows = read_rows(here / "out" / "metrics.jsonl")
    assert len(rows) == 2
    resolved = yaml.safe_load((here / "out" / "config.yaml").read_text())
    kept = {key: value for key, value in preset.options.items() if key not in toy}
    assert {key: resolved[key] for key in kept} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()
    }


def test_a_file_comes_after_the_preset_and_flags_after_both(here):
    (here / "own.yaml").write_text("beta: 0.3\nbatch_size: 7\n")
    command = find("dpo", TABLE)
    line = "--preset ultrafeedback-dpo --config own.yaml --batch-size 9 --out x"
    found = parse("dpo", command.options_class(), line.split())
    assert (found.dpo.beta, found.dpo.batch_size, found.dpo.optim.learning_rate) == (0.3, 9, 5e-7)


def test_a_name_that_is_not_there_is_refused_with_the_nearest(capsys):
    assert tether("dpo --preset ultrafedback-dpo --out x") == 2
    assert "there is no preset 'ultrafedback-dpo'; did you mean ultrafeedback-dpo" in capsys.readouterr().err
    assert tether("grpo --preset ultrafeedback-dpo --out x") == 2
    assert "'ultrafeedback-dpo' is a preset of 'tether dpo'" in capsys.readouterr().err


def test_they_are_listed_and_each_is_a_file_for_config(here, capsys):
    assert tether("presets") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)
    for name, preset in PRESETS.items():
        assert tether("presets", name) == 0
        text = capsys.readouterr().out
        (here / "p.yaml").write_text(text)
        assert preset.source in text
        assert yaml.safe_load(text).keys() == preset.options.keys()
    assert tether("presets grpo") == 2
    assert "there is no preset 'grpo'" in capsys.readouterr().err


def test_columns_are_read_under_their_own_names(here, capfd):
    asked = "--max-new-tokens 2 --columns prompt=question --out g.jsonl"
    assert tether(f"generate --model m --prompts problems.jsonl {asked}") == 0
    assert read_rows(here / "g.jsonl")[0]["prompt"] == "What is 0 + 1?"
    wrong = {
        "prompt=quest": "column 'quest' (--columns) is missing",
        "prompt": "'prompt' is not NAME=COLUMN",
        "prompt=a prompt=b": "prompt is named twice",
    }
    for columns, says in wrong.items():
        assert tether(f"generate --model m --prompts problems.jsonl --columns {columns} --out h.jsonl") == 2
        assert says in capfd.readouterr().err


def test_plain_text_is_read_as_turns(here):
    line = "generate --model m --prompts p.jsonl --max-new-tokens 2 --conversation --system Be. --out g.jsonl"
    assert tether(line) == 0
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Word 0 is"}]
    assert read_rows(here / "g.jsonl")[0]["prompt"] == turns
    assert tether("sft --model m --data texts.jsonl --conversation --quiet --out out") == 0
