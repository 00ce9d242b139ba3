"""docs/python.md: its blocks run as they stand, and it describes every public name and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tether

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "page"}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"python.md block {number}", "exec", dont_inherit=True), space)
    printed = capsys.readouterr().out
    assert "resume from its last checkpoint with the same call and resume=True" in printed
    assert space["better"].model is not space["model"]
    assert len(space["log"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "stopped"]


def described(text: str) -> list[str]:
    every = text.split("## Every name\n", 1)[1]
    return re.findall(r"^\| `(\w+)` \|", every, re.MULTILINE)


def test_every_public_name_is_described_once():
    found = described(PAGE)
    assert len(found) == len(set(found))
    assert sorted([*found, "__version__"]) == sorted(tether.__all__)
    assert "`__version__`" in PAGE


@pytest.mark.parametrize("module", ["sft", "reward_model", "rejection_sampling", "ppo", "grpo"])
def test_what_a_module_holds_is_named(module):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{module}` |"))
    assert set(re.findall(r"`(\w+)`", row)) - {module} == set(getattr(tether, module).__all__)


def test_what_a_run_holds_is_named():
    table = PAGE.split("## The result\n", 1)[1].split("```python", 1)[0]
    named = {
        name.partition("(")[0]
        for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    public = {name for name in vars(tether.Run) if not name.startswith("_")} | {"path"}
    assert named == public - {"temporary"}


def test_dir_shows_the_public_names_alone():
    assert dir(tether) == sorted(tether.__all__)
