"""Nothing that is printed controls the terminal."""

from __future__ import annotations

import json

import pytest

from commandline import tether, write_rows
from hostile import GRPO
from tether.cli import main
from tether.untrusted import one_line, printable

CONTROL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"
"""Control sequences that a terminal would obey."""


def test_control_characters_are_escaped():
    assert printable("a b é 漢 😀") == "a b é 漢 😀"
    assert printable("\x1b[31m \x9b2J \x7f \u202e \n") == r"\u001b[31m \u009b2J \u007f \u202e \n"
    line = json.dumps({"a": "\x9b 😀 \ud800 \U000e0001"}, ensure_ascii=False)
    assert json.loads(printable(line)) == json.loads(line)
    assert printable(line).isprintable()
    assert one_line("a\n\tb\x1b") == r"a b\u001b"


@pytest.mark.parametrize(
    "line",
    [
        ["grpo", "--reward", CONTROL, "--model", "base", "--prompts", "p.jsonl", "--out", "out"],
        ["grpo", "--reward", "r.py:fn", "--model", CONTROL, "--prompts", "p.jsonl", "--out", "out"],
        ["report", CONTROL],
        [CONTROL],
    ],
)
def test_an_error_prints_no_control_sequence(line, here, capfd):
    assert main(line) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.isprintable()
    assert r"\u001b]0;owned" in said


def test_a_run_prints_no_control_sequence(here, tiny, capfd, monkeypatch):
    """Warnings of a reward that is retried and of a data file with a duplicate row."""
    monkeypatch.setattr("tether.rewards.supervision.FIRST_PAUSE", 0.0)
    (here / "r.py").write_text(
        "calls = []\n"
        "def fn(completions, **_):\n"
        "    calls.append(1)\n"
        "    if not calls[1:]:\n"
        f"        raise OSError({CONTROL!r})\n"
        "    return [1.0] * len(completions)\n"
    )
    write_rows(here / f"{CONTROL}.jsonl", [{"prompt": "a"}] * 2)
    line = [*GRPO.split(), "--reward", "r.py:fn", "--reward-retries", "1", "--prompts", f"{CONTROL}.jsonl"]
    assert main([*line, "--out", "out", "--model", tiny]) == 0
    said = capfd.readouterr().err.splitlines()
    assert sum(r"\u001b]0;owned" in one for one in said) == 2
    assert all(one.isprintable() for one in said)


def test_samples_print_no_control_sequence(here, tiny, capfd):
    write_rows(here / "p.jsonl", [{"prompt": f"a {CONTROL}"}])
    assert tether("generate --prompts p.jsonl --max-new-tokens 30 --group-size 8 --model", tiny) == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [json.loads(line)["prompt"] for line in lines] == [f"a {CONTROL}"] * 8
