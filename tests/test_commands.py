"""Every command as typed: what it prints, what it writes, and how its options are filled."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from commandline import read_rows, tether, untimed, workspace
from runs import LINES
from tether import cli
from tether.commands import TABLE
from tether.errors import ConfigError
from tether.flags import flatten, options_of, parse
from tether.looking.report import Report
from tether.names import RENAMED
from tether.runtime.directory import FORMAT
from tether.training.ppo import PPO
from tether.training.rejection_sampling import RejectionSampling
from tiny import make_model

TRAINING = {name: f"{line} --quiet" for name, line in LINES.items()}
SAMPLED = ["generate", "score", "reference"]
PHASES = {
    "sft": ["update"],
    "reward": ["update"],
    "dpo": ["update"],
    "rejection-sampling": [*SAMPLED, "update", "eval"],
    "ppo": [*SAMPLED, "advantage", "update"],
    "grpo": [*SAMPLED, "advantage", "update"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with something to train on, to be in."""
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def test_every_command_is_in_a_group_of_the_help(capsys):
    assert tether("--help") == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.endswith(":")] == ["start here:", "train:", "look:"]
    for command in TABLE:
        assert f"\n  {command.name} " in shown


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_a_row_of_the_table_leads_to_options_and_a_function(command):
    assert dataclasses.is_dataclass(command.options_class())
    assert callable(command.function())


def test_commands_that_can_be_resumed_are_those_that_train():
    assert [command.name for command in TABLE if command.resumable] == list(TRAINING)


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_help_names_every_option_and_nothing_internal(command, capsys):
    with pytest.raises(SystemExit) as stop:
        tether(command.name, "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    options = list(options_of(command.options_class()))
    for option in options:
        assert option.flag.upper() in shown.upper()
    assert len({option.name for option in options}) == len(options)  # a name means one option
    for inside in ("0x", "<", "MISSING", "tuple", "None", "Config", "()"):
        assert inside not in shown.replace("<think>", "")


def test_the_program_starts_as_a_module():
    found = subprocess.run(
        [sys.executable, "-m", "tether.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("tether ")


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_command_leaves_a_run_that_can_be_read(name, tiny, here, capsys):
    assert tether(TRAINING[name], "--model", tiny, "--out", "runs/one") == 0
    assert capsys.readouterr().err == ""
    run = here / "runs" / "one"
    assert {"config.yaml", "metrics.jsonl", "model", "summary.json"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "summary.json").read_text())["seconds"] > 0
    assert not list(run.rglob(".*"))
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    kind.from_pretrained(run / "model")


@pytest.mark.parametrize("name", TRAINING)
def test_every_row_says_what_its_step_spent(name, tiny, here):
    assert tether(TRAINING[name], "--model", tiny, "--out", "run") == 0
    rows = read_rows(here / "run" / "metrics.jsonl")
    in_phases = 0.0
    for row in rows:
        time = {key.removeprefix("time/"): seconds for key, seconds in row.items() if key.startswith("time/")}
        flops = {key.removeprefix("flops/"): count for key, count in row.items() if key.startswith("flops/")}
        assert list(time) == [*PHASES[name], *(["eval"] if "eval/loss" in row else [])]
        assert set(flops) == set(time) & {"generate", "reference", "update"}
        assert min(time.values()) > 0
        assert sum(time.values()) <= row["step_time"]
        in_phases += sum(time.values())
        used = [flops["update"] / time["update"], sum(flops.values()) / row["step_time"]]
        assert row["mfu"] / row["mfu/step"] == pytest.approx(used[0] / used[1])
        assert 0 < row["mfu"] < 2  # a machine that others share may be slower when its rate is read
        assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["step_time"])
        assert 0.05 < row["memory/peak_gib"] < 64
    assert in_phases > 0.5 * sum(row["step_time"] for row in rows)


def test_rejection_sampling_writes_what_it_kept_as_data_for_sft(tiny, here):
    assert tether(f"{TRAINING['rejection-sampling']} --top-k 2 --rounds 1", "--model", tiny, "--out", "rs") == 0
    kept = read_rows(here / "rs" / "selected.jsonl")
    assert len(kept) == 5 * 2
    assert {"prompt", "completion", "score"} <= kept[0].keys()
    again = [row for row in kept if row["completion"].strip()]
    (here / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    assert tether("sft --data kept.jsonl --quiet --out again", "--model", tiny) == 0


def test_a_reward_model_is_a_reward_and_rewards_add_up(tiny, here):
    assert tether(f"{TRAINING['reward']} --out judge", "--model", tiny) == 0
    line = "grpo --prompts p.jsonl --group-size 2 --steps 1 --prompts-per-step 2 --max-new-tokens 4 --quiet --out run"
    assert (
        tether(line, "--model", tiny, "--reward", "judge/model", "--reward", "r.py:fn=0.5", "--reward", "length:3=0")
        == 0
    )
    (row,) = read_rows(here / "run" / "metrics.jsonl")
    parts = {name: row[f"rewards/{name}/mean"] for name in ("judge", "fn", "length")}
    assert row["reward"] == pytest.approx(parts["judge"] + 0.5 * parts["fn"], abs=1e-5)


def test_eval_measures_a_policy(tiny, here, capsys):
    line = f"eval --model {tiny} --prompts p.jsonl --reward r.py:fn --group-size 3 --max-new-tokens 4"
    assert tether(line) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["completions"] == 15
    assert {"reward", "reward_ci95", "rewards", "mean_length"} <= alone.keys()
    assert not {"kl", "win_rate"} & alone.keys()  # there is nothing to compare with
    assert tether(f"{line} --reference {tiny}") == 0
    with_itself = json.loads(capsys.readouterr().out)
    assert with_itself["kl"] == pytest.approx(0, abs=1e-6)
    assert with_itself["win_rate"] == 0.5
    assert tether(f"{line} --reference {make_model(here / 'other', seed=1)}") == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0.1


def test_eval_measures_a_reward_model(tiny, capsys):
    assert tether(f"{TRAINING['reward']} --out judge", "--model", tiny) == 0
    assert tether("eval --reward-model judge/model --pairs pairs.jsonl") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 20
    assert 0 <= found["accuracy"] <= 1
    assert found["calibration_error"] >= 0


def test_generate_writes_to_the_terminal_or_to_a_file(tiny, here, capsys):
    line = "generate --prompts p.jsonl --group-size 2 --max-new-tokens 4 --model"
    assert tether(line, tiny) == 0
    shown = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert tether(line, tiny, "--out", "c.jsonl") == 0
    assert read_rows(here / "c.jsonl") == shown
    assert len(shown) == 10
    assert shown[0].keys() == {"prompt", "answer", "completion", "finish_reason", "tokens"}
    assert tether(f"{line} {tiny} --seed 1 --out d.jsonl") == 0
    assert read_rows(here / "d.jsonl") != shown


def test_stop_strings_end_completions(tiny, here):
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    assert tether(f"generate --model {tiny} --prompts p.jsonl --max-new-tokens 60 --out c.jsonl --stop", *letters) == 0
    stopped = [row for row in read_rows(here / "c.jsonl") if row["finish_reason"] == "stop"]
    assert stopped
    assert all(row["completion"][-1] in letters and row["completion"][-2:-1] not in letters for row in stopped)


def test_doctor_says_what_it_found(capsys):
    assert tether("doctor") == 0
    shown = capsys.readouterr().out
    assert "rollout engine  works" in shown
    assert {"tether", "python", "torch", "transformers", "device", "extras"} <= {
        r.split()[0] for r in shown.splitlines()
    }


def test_a_run_starts_from_a_file_and_flags_override_it(tiny, here):
    (here / "c.yaml").write_text(
        f"model: {tiny}\nprompts: p.jsonl\nreward: r.py:fn\ngroup_size: 2\nlearning-rate: 1e-5\nsteps: 1\n"
        "prompts_per_step: 2\nmax_new_tokens: 3\nstop: [x, y]\nquiet: true\n"
    )
    assert tether("grpo --config c.yaml --group-size 4 --out run --stop") == 0
    written = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert (written["group_size"], written["learning_rate"], written["reward"]) == (4, 1e-5, [f"{here}/r.py:fn"])
    assert written["stop"] == []  # taken back by the empty flag
    assert written["clip_low"] == 0.2  # defaults are written out too


@pytest.mark.parametrize("name", TRAINING)
def test_the_configuration_of_a_run_repeats_it(name, tiny, here):
    assert tether(f"{TRAINING[name]} --seed 3", "--model", tiny, "--out", "one") == 0
    assert tether(f"{name} --config one/config.yaml --out two") == 0

    rows = {run: untimed(read_rows(here / run / "metrics.jsonl")) for run in ("one", "two")}
    assert rows["one"] == rows["two"]
    one, two = (here / run / "model" / "model.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert tether(f"{TRAINING[name]} --seed 4", "--model", tiny, "--out", "three") == 0
    third = untimed(read_rows(here / "three" / "metrics.jsonl"))
    assert rows["one"] != third  # otherwise the comparison above would prove nothing


def test_what_is_flattened_is_what_is_parsed():
    line = "--model m --prompts p --reward a --reward b=2 --out o --adaptive-kl-target 6 --no-whiten-advantages"
    command = parse("ppo", PPO, [*line.split(), "--temperature", "0.7"])
    assert command.task.reward == ("a", "b=2")
    assert command.ppo.adaptive_kl_target == 6.0
    assert not command.ppo.whiten_advantages
    assert command.ppo.sampling.temperature == 0.7
    assert command.ppo.optim.adam_eps == 1e-5  # PPO's own default, not Optim's
    assert flatten(command).keys() == {option.name for option in options_of(PPO)}


def test_an_option_can_be_taken_back_to_none(here):
    (here / "c.yaml").write_text("adaptive_kl_target: 6\n")
    needed = ["--model", "m", "--prompts", "p", "--reward", "a", "--out", "o", "--config", "c.yaml"]
    assert parse("ppo", PPO, needed).ppo.adaptive_kl_target == 6
    assert parse("ppo", PPO, [*needed, "--adaptive-kl-target", "none"]).ppo.adaptive_kl_target is None


def test_options_are_checked_when_all_are_read(here):
    """K = 12 of the file is too many for the default N, and right for the flag's."""
    (here / "c.yaml").write_text("top_k: 12\n")
    needed = ["--model", "m", "--prompts", "p", "--reward", "a", "--out", "o", "--config", "c.yaml"]
    command = parse("rejection-sampling", RejectionSampling, [*needed, "--group-size", "16"])
    assert (command.rejection_sampling.group_size, command.rejection_sampling.top_k) == (16, 12)


def test_a_reader_that_closes_the_pipe_is_no_error(monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "dispatch", closed)
    assert tether("generate") == 0


NEEDED = "--model m --prompts p --reward a --out o"


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=RENAMED.keys())
@pytest.mark.parametrize("as_flags", [True, False], ids=["flag", "file"])
def test_an_old_name_is_refused_and_the_new_one_named(old, new, as_flags, here, capfd):
    command = "rejection-sampling" if old == "samples_per_prompt" else "grpo" if old == "refills" else "ppo"
    line = f"{command} {NEEDED}"
    (here / "old.yaml").write_text(f"{old}: 1\n")
    given = f"--{old.replace('_', '-')} 1" if as_flags else "--config old.yaml"
    assert tether(f"{line} {given}") == 2
    (said,) = capfd.readouterr().err.splitlines()
    names = [f"--{name.replace('_', '-')}" if as_flags else name for name in new]
    assert said.endswith(f" is now called {' and '.join(names)}")
    assert (f"--{old.replace('_', '-')}" if as_flags else f"old.yaml: option '{old}'") in said


def test_an_old_name_of_another_command_is_just_unknown(capfd):
    assert tether("sft --model m --data d --out o --clip-eps 1") == 2
    assert "unknown option --clip-eps" in capfd.readouterr().err


def test_the_configuration_of_another_format_is_refused(here, capfd):
    (here / "c.yaml").write_text(f"format: {FORMAT + 1}\n")
    assert tether(f"ppo {NEEDED} --config c.yaml") == 2
    assert f"c.yaml: made by another version of tether (format {FORMAT + 1})" in capfd.readouterr().err
    (here / "c.yaml").write_text(f"format: {FORMAT}\nkl_coef: 0.3\n")
    assert parse("ppo", PPO, [*NEEDED.split(), "--config", "c.yaml"]).ppo.kl_coef == 0.3


def test_a_positional_argument_that_repeats():
    assert parse("report", Report, ["a", "b", "--out", "c.html"]) == Report(runs=("a", "b"), out="c.html")
    with pytest.raises(ConfigError, match="RUN"):
        parse("report", Report, [])
