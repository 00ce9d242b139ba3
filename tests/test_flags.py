"""Unknown options: mistyped, of an earlier version, of another tool; and the order of the help."""

from __future__ import annotations

import re

import pytest

from commandline import tether
from tether.commands import TABLE, find
from tether.errors import ConfigError
from tether.flags import options_of, parse
from tether.names import ELSEWHERE, RENAMED, closest, did_you_mean
from tether.training.grpo import GRPO

NEEDED = ["--model", "m", "--prompts", "p", "--reward", "a", "--out", "o"]
MANY = 15
"""Options from which a command's help shows ten of them first."""


def names(command: str) -> set[str]:
    row = find(command, TABLE)
    assert row is not None
    return {option.name for option in options_of(row.options_class())}


ALL = set().union(*(names(command.name) for command in TABLE))


@pytest.mark.parametrize("table", [RENAMED, ELSEWHERE], ids=["renamed", "elsewhere"])
def test_every_name_that_is_advised_is_an_option(table):
    for theirs, ours in table.items():
        assert ours, theirs
        assert set(ours) <= ALL, theirs


def test_no_name_of_ours_is_only_another_tools_name_for_the_same():
    for theirs, ours in ELSEWHERE.items():
        assert theirs not in ours


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [
        ("grpo", "--beta", "--kl-coef"),
        ("ppo", "--beta", "--kl-coef"),
        ("grpo", "--num-generations", "--group-size"),
        ("grpo", "--max-completion-length", "--max-new-tokens"),
        ("ppo", "--response-length", "--max-new-tokens"),
        ("grpo", "--epsilon", "--clip-low and --clip-high"),
        ("ppo", "--cliprange", "--clip-low and --clip-high"),
        ("ppo", "--num-ppo-epochs", "--epochs-per-step"),
        ("ppo", "--gae-lambda", "--lam"),
        ("sft", "--per-device-train-batch-size", "--batch-size"),
        ("grpo", "--per-device-train-batch-size", "--prompts-per-step"),
        ("sft", "--num-train-epochs", "--epochs"),
        ("grpo", "--num-train-epochs", "--steps"),
        ("sft", "--lr", "--learning-rate"),
        ("reward", "--output-dir", "--out"),
        ("sft", "--dataset", "--data"),
        ("reward", "--dataset", "--pairs"),
        ("grpo", "--dataset", "--prompts"),
        ("ppo", "--model-name-or-path", "--model"),
        ("ppo", "--actor-rollout-ref.actor.clip-ratio-low", "--clip-low"),
        ("rejection-sampling", "--n-samples-per-prompt", "--group-size"),
        ("generate", "--top-k", "--top-k-tokens"),
    ],
)
def test_an_option_of_another_tool_names_ours(command, theirs, ours):
    row = find(command, TABLE)
    assert row is not None
    with pytest.raises(ConfigError) as caught:
        parse(command, row.options_class(), [theirs, "1"])
    assert str(caught.value) == f"unknown option {theirs}; use {ours}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--learning-rte", "; did you mean --learning-rate?"),
        ("--group_size", "; did you mean --group-size?"),
        ("--max", "; did you mean --max-turns or --max-rows or --max-new-tokens?"),
        ("--nonsense", ""),
        ("--tensor-parallel", ""),  # at a similarity of 0.5: --temperature
        ("--reward-weights", ""),  # --reward-retries
        ("--logging-steps", ""),  # --min-new-tokens
    ],
)
def test_only_a_close_name_is_suggested(typed, said):
    with pytest.raises(ConfigError) as caught:
        parse("grpo", GRPO, [*NEEDED, typed, "3"])
    assert str(caught.value) == f"unknown option {typed}{said}"


def test_closest_names():
    assert closest("gpro", ["ppo", "grpo", "sft"]) == ["grpo"]
    assert closest("g", ["grpo", "gamma"]) == []  # one letter says nothing
    assert closest("gr", ["grpo", "group", "gamma"]) == ["grpo", "group"]
    assert did_you_mean([]) == ""
    assert did_you_mean(["a", "b"]) == "did you mean a or b?"


def test_all_unknown_flags_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse("grpo", GRPO, [*NEEDED, "--beta=0.1", "--foo", "-1", "--clip-eps", "0.2", "--beta", "2"])
    assert str(caught.value) == (
        "unknown options: --beta (use --kl-coef), --foo, --clip-eps (is now called --clip-low and --clip-high)"
    )


def test_all_unknown_keys_of_a_file_are_named_at_once(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("clip_eps: 0.2\nproducts: auto\nkl-coeff: 1\nbeta: 0.1\nnonsense: x\nsteps: many\n")
    with pytest.raises(ConfigError) as caught:
        parse("grpo", GRPO, [*NEEDED, "--config", str(path)])
    assert str(caught.value) == (
        f"{path}: unknown options: 'clip_eps' (is now called clip_low and clip_high), 'products' (is now called "
        "matmul_dtype), 'kl-coeff' (did you mean kl_coef?), 'beta' (use kl_coef), 'nonsense'"
    )


def test_a_file_of_another_version_says_what_else_has_to_change(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("format: 1\nclip_eps: 0.2\nnonsense: 3\n")
    with pytest.raises(ConfigError) as caught:
        parse("grpo", GRPO, [*NEEDED, "--config", str(path)])
    assert str(caught.value) == (
        f"{path}: made by another version of tether (format 1); "
        "unknown options: 'clip_eps' (is now called clip_low and clip_high), 'nonsense'"
    )


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_ten_options_come_first_where_there_are_many(command):
    options = list(options_of(command.options_class()))
    assert len(command.first) == (10 if len(options) > MANY else 0)
    assert len(set(command.first)) == len(command.first)
    assert set(command.first) <= {option.name for option in options}
    required = {option.name for option in options if option.default.__class__.__name__ == "_MISSING_TYPE"}
    assert not command.first or required <= set(command.first)


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit):
        tether(command, "--help")
    return capsys.readouterr().out


def test_help_shows_them_first_and_no_option_twice(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of("grpo", capsys)
    row = find("grpo", TABLE)
    assert row is not None
    flags = [
        flag for flag in re.findall(r"^  (--[a-z0-9-]+)", shown, re.MULTILINE) if flag not in ("--config", "--preset")
    ]
    assert flags[:10] == [f"--{name.replace('_', '-')}" for name in row.first]
    assert len(flags) == len(set(flags)) == len(names("grpo"))
    assert max(map(len, shown.splitlines())) <= 80
    titles = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert titles[0] == "most used"
    assert {"Steps", "The run", "Options of GRPO"} <= set(titles)


def test_help_of_a_command_with_few_options_has_one_group_of_them(capsys):
    shown = help_of("resume", capsys)
    assert "\noptions:\n" in shown
    assert "most used" not in shown
