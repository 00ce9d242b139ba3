"""What the README's commands read is in the repository, or made by a command that stands above."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tether.data.reading import read_rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if "tether " in line]
READS = {
    "--model", "--prompts", "--pairs", "--data", "--reward", "--reference", "--reward-model", "--against",
    "--eval-prompts", "--eval-pairs", "--eval-data", "--eval-reward",
}  # fmt: skip


def paths_of(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What a command reads, and what it makes."""
    reads, makes = [], []
    flag = ""
    for argument in arguments[2:]:
        if argument.startswith("--"):
            flag = argument
            continue
        path = argument.partition(":")[0].partition("=")[0]
        if flag == "--out":
            makes.append(path)
        elif not flag or (flag in READS and ("/" in path or Path(path).suffix)):
            reads.append(path)
        flag = ""
    return reads, makes


def test_paths_of_a_command():
    line = "tether eval --model runs/a/model --reward f.py:fn=2 --reward length:3 --steps 2 --out b"
    assert paths_of(line.split()) == (["runs/a/model", "f.py"], ["b"])
    line = "tether report runs/a runs/b --out c.html"
    assert paths_of(line.split()) == (["runs/a", "runs/b"], ["c.html"])
    line = "tether chat runs/a/model --against base"
    assert paths_of(line.split()) == (["runs/a/model"], [])


def test_every_file_is_shipped_or_made_above():
    made: list[str] = []
    assert len(COMMANDS) > 20
    for arguments in COMMANDS:
        reads, makes = paths_of(arguments)
        for path in reads:
            shipped = path == "base" or (ROOT / path).exists()
            related = any(Path(path).is_relative_to(one) or Path(one).is_relative_to(path) for one in made)
            assert shipped or related, f"{path} in {shlex.join(arguments)}"
        made += makes


def test_no_two_commands_write_one_directory():
    made = [path for arguments in COMMANDS for path in paths_of(arguments)[1]]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("word", ["Gold", "Proxy", "KL"])
def test_terms_are_defined_where_the_first_figures_are(word):
    first = README.index("Win rate against the base")
    assert f"**{word}** is" in README[:first]
    assert "**nat**" in README[:first]


def test_the_example_data_is_of_different_prompts():
    def prompts(name: str) -> set[str]:
        return {row.values["prompt"] for row in read_rows(str(ROOT / "examples" / name))}

    for training, held_out in (("prompts.jsonl", "held_out_prompts.jsonl"), ("pairs.jsonl", "held_out_pairs.jsonl")):
        assert prompts(held_out)
        assert not prompts(training) & prompts(held_out)
