"""The rules of this test suite, and that the pages which name its tests are right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 400
"""Lines of a file."""


def imports(source: str) -> Iterator[str]:
    """Every part of every dotted name that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]


def refused(source: str, modules: set[str]) -> list[str]:
    """Imports of test modules and of conftest."""
    return [name for name in imports(source) if name == "conftest" or (name.startswith("test_") and name in modules)]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_file_of_the_suite_is_short_and_imports_no_test_module(path):
    source = path.read_text(encoding="utf-8")
    assert refused(source, {path.stem for path in FILES}) == []
    assert source.count("\n") < LONGEST


@pytest.mark.parametrize(
    "source",
    [
        "import test_crash",
        "from conftest import make_model",
        "def f():\n    from tests.test_crash import weight",
        "from tests import conftest",
    ],
)
def test_an_import_of_a_test_module_is_found(source):
    assert refused(source, {"test_crash"})


def test_names_of_test_modules_differ():
    """pytest imports each by its bare name."""
    names = [path.name for path in FILES if path.name != "conftest.py"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("page", "directory"), [("threat_model", "security"), ("faults", "faults")])
def test_a_page_names_tests_that_exist(page, directory):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    places = {directory, *re.findall(r"`tests/(\w+)/`", text)}
    files = [path for place in places for path in (ROOT / "tests" / place).glob("test_*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    functions = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 10
    assert named <= functions
    for file in re.findall(r"`(tests/[^`]+)`", text):
        assert (ROOT / file).exists()


@pytest.mark.parametrize("module", ["crash", "fuzz"])
def test_a_harness_runs_as_its_page_says(module):
    """Outside pytest, which alone puts ``tests/`` on the path."""
    line = [sys.executable, "-m", f"tests.{module}", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m tests.{module}" in done.stdout
