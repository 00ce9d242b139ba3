"""``tether show``: the completions of a step, or of the held-out prompts, in a terminal."""

from __future__ import annotations

import re

import pytest

from commandline import tether
from evaluated import evaluated_run
from helpers import completion, group
from tether.looking.show import figures_line, in_order, style
from tether.report.completions import completion_of, read_completions, rollout_file, token_texts, tokens_of
from tether.runtime.directory import RunDirectory, rollout_table
from tether.types import CompletionFigures, RolloutGroup, Score, ScoredGroup
from tiny import byte_tokenizer, make_model

TEXTS = {"Yes!": 0.9, "No\x1b[31m": -0.5, "It is.": 0.1}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run with the rollouts of steps 5 and 10, and the tokenizer of its model."""
    rows = []
    for text in TEXTS:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        rows.append(completion(ids, text=text, logprobs=[-0.5 * i for i in range(len(ids))]))
    asked = group([0, 5], [[1]], text="Is it? ").prompt
    scores = tuple(Score(total=score, parts={"fn": score, "none": None}) for score in TEXTS.values())
    groups = [ScoredGroup(rollouts=RolloutGroup(prompt=asked, completions=tuple(rows)), scores=scores)]
    figures = [
        [
            CompletionFigures(ref_logp=tuple(p - 0.25 for p in row.sampler_logp), advantages=(0.5,) * len(row.ids))
            for row in rows
        ]
    ]
    with RunDirectory(tmp_path / "run", {"command": "ppo", "model": str(tmp_path / "model")}) as directory:
        for step in (5, 10):
            directory.rollouts(step, groups, figures)
    make_model(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_rollouts_hold_kl_and_advantage_of_the_completion(run):
    """Each token is 0.25 more likely than under the reference, and its advantage is 0.5."""
    first = read_completions(rollout_file(run, 10))[0]
    assert first.length == 5
    assert (first.kl, first.advantage) == (pytest.approx(0.25 * 5), pytest.approx(0.5))
    assert first.row["ref_logp"] == [p - 0.25 for p in first.row["sampler_logp"]]
    assert first.parts == {"fn": 0.9, "none": None}


def test_the_newest_step_is_shown_and_others_are_named(run, capsys):
    assert tether("show", run) == 0
    assert "step_000010.parquet: 3 of 3 completions" in capsys.readouterr().out
    assert tether("show", run, "--step", 5) == 0
    assert "step_000005.parquet" in capsys.readouterr().out
    assert tether("show", run, "--step", 7) == 2
    assert "there are those of step 5, 10" in capsys.readouterr().err


def test_completions_are_shown_with_their_figures_and_cannot_control_the_terminal(run, capsys):
    assert tether("show --sort reward --number 2", run) == 0
    out = capsys.readouterr().out
    assert "reward 0.9 (fn 0.9, none –)  kl 1.25  advantage +0.5  5 tokens, eos" in out
    assert out.index("Yes!") < out.index("It is.")
    assert "No" not in out
    assert tether("show --sort reward --lowest --number 1", run) == 0
    assert "completion: No\\u001b[31m" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["kl", "length"])
def test_completions_are_sorted_by_other_figures(run, key):
    found = in_order(read_completions(rollout_file(run, 10)), key, lowest=False)
    lengths = [one.length for one in found]
    assert lengths == sorted(lengths, reverse=True)


def test_tokens_have_one_line_each_without_a_terminal(run, capsys):
    assert tether("show --sort reward --number 1 --tokens", run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["token", "logp"]) + 2
    assert lines[start : start + 2] == [["Y", "-0.000", "+0.250", "+0.500"], ["e", "-0.500", "+0.250", "+0.500"]]


def test_tokens_are_shaded_on_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert tether("show --sort reward --number 1 --tokens --shade kl", run) == 0
    out = capsys.readouterr().out
    assert "KL to the reference" in out
    assert "\x1b[" in out


def test_shades():
    assert style(-6.0, "logp", 6.0) == "black on rgb(255,120,120)"
    assert style(-60.0, "logp", 6.0) == style(-6.0, "logp", 6.0)
    assert style(-0.1, "logp", 6.0) == ""
    assert style(2.0, "kl", 2.0) == "black on rgb(120,120,255)"
    assert style(-2.0, "advantage", 2.0) == "black on rgb(255,120,120)"
    assert style(None, "kl", 2.0) == "dim"


def test_the_texts_of_tokens_add_up(tokenizer):
    for text in ("plain text that is a little longer than nine tokens", "über 漢字 x", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == text


def test_tokens_of_an_environment_have_no_figures(tokenizer):
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    rollouts = group([0, 5], [ids], masks=[(True, False)])
    one = ScoredGroup(rollouts=rollouts, scores=(Score(total=1.0),))
    figures = [[CompletionFigures(ref_logp=(-3.0, 0.0), advantages=(2.0, 0.0))]]
    (row,) = rollout_table(1, [one], figures).to_pylist()
    assert (row["kl"], row["advantage"]) == (2.0, 2.0)  # of the emitted token alone
    first, second = tokens_of(completion_of(row), tokenizer)
    assert (first.kl, first.advantage) == (2.0, 2.0)
    assert (second.emitted, second.logp, second.kl, second.advantage) == (False, None, None, None)


def test_rollouts_without_figures_have_the_same_columns():
    one = ScoredGroup(rollouts=group([0, 5], [[7, 1]]), scores=(Score(total=1.0),))
    plain = rollout_table(1, [one])
    assert plain.schema == rollout_table(1, [one], [[CompletionFigures(ref_logp=(-1.0, -1.0))]]).schema
    (row,) = plain.to_pylist()
    assert (row["kl"], row["advantage"], row["ref_logp"], row["advantages"]) == (None,) * 4


def test_held_out_completions(tmp_path, capsys):
    path = evaluated_run(tmp_path / "a", {"x": [1.0], "y": [2.0]}, {"x": [0.0], "y": [5.0]}, kl=2.5)
    assert tether("show --held-out --sort reward", path) == 0
    out = capsys.readouterr().out
    lines = [
        "policy  reward 2 (fn 2)  kl 2.5  2 tokens, eos",
        "reference  reward 5",
        "policy  reward 1",
        "reference  reward 0",
    ]
    assert "2 of 2 completions" in out
    assert [out.index(line) for line in lines] == sorted(out.index(line) for line in lines)
    assert tether("show", path) == 2
    assert "--held-out" in capsys.readouterr().err


def test_different_held_out_prompts_come_first_each_above_the_reference_of_its_seed(tmp_path, capsys):
    path = evaluated_run(tmp_path / "a", {"x": [11, 12], "y": [21, 22]}, {"x": [31, 32], "y": [41, 42]})
    assert tether("show --held-out --number 3", path) == 0
    assert re.findall(r"(policy|reference)  reward (\d+)", capsys.readouterr().out) == [
        ("policy", "11"), ("reference", "31"), ("policy", "21"), ("reference", "41"), ("policy", "12"),
        ("reference", "32"),
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "said"), [("reward", "tether report"), ("sft", "tether generate")])
@pytest.mark.parametrize("option", ["", "--held-out"])
def test_a_run_without_completions_says_what_it_is(command, said, option, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"command: {command}\n")
    assert tether(f"show {option}", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{command}" in error
    assert said in error


def test_a_part_of_a_run_names_the_run(run, capsys):
    for part in (run / "rollouts", run / "rollouts" / "step_000010.parquet"):
        assert tether("show", part) == 2
        assert f"part of the run {run}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("show {run} --number 0", "number must be at least 1"),
        ("show {run} --held-out", "has no evaluation.parquet"),
        ("show nowhere", "not a run directory"),
        ("show {run} --step 5 --held-out", "one of --step and --held-out"),
        ("show {run} --held-out --tokens", "without their tokens"),
        ("show {run} --lowest", "--lowest needs --sort"),
    ],
)
def test_what_cannot_be_shown_is_one_line(line, said, run, capsys):
    assert tether(line.format(run=run)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_figure_that_no_completion_has_is_refused(run, capsys):
    import pyarrow.parquet

    file = run / "rollouts" / "step_000010.parquet"
    table = pyarrow.parquet.read_table(file).drop_columns(["kl", "ref_logp"])
    pyarrow.parquet.write_table(table, file)
    assert tether("show --sort kl", run) == 2
    assert "have no kl" in capsys.readouterr().err
    assert tether("show --tokens --shade kl", run) == 2
    assert "holds no kl of its tokens" in capsys.readouterr().err
    assert "kl" not in figures_line(read_completions(file)[0])
