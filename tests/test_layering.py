"""Imports point down only; what is heavy is imported where it is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "tether"

FLOORS = (
    ("ops",),
    ("errors", "seeds", "hub"),
    ("interruption", "durations", "untrusted"),
    ("types",),
    ("data",),
    ("models",),
    ("generation",),
    ("rewards",),
    ("algorithms",),
    ("runtime", "evaluation"),
    ("report",),
    ("config", "flags"),
    ("training",),
    ("commands", "doctor", "quickstart", "resume"),
    ("cli",),
)
"""From the ground up. A module imports from lower floors and from its own package, not from its neighbours."""
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
HEAVY = {"datasets", "peft", "matplotlib", "vaderSentiment", "pyarrow"}
LAZY_IMPORTS = "__init__"
"""The package itself names what Python users import from it, and imports it when they do."""


def part_of(path: Path) -> str:
    """The package or the module directly below ``tether`` that a file belongs to."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """The dotted names that are imported, ``from a import b`` as ``a.b``; with ``top_only``, none in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def upward(part: str, source: str) -> list[str]:
    """Imports of ``part`` that do not point down."""
    found = []
    for name in imports(ast.parse(source)):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "tether" and target not in (part, "__version__") and FLOOR.get(target, len(FLOORS)) >= FLOOR[part]:
            found.append(name)
        if part == "ops" and root not in ("torch", "tether", "__future__", "math", "typing", "collections"):
            found.append(name)
    return found


def heavy(source: str) -> list[str]:
    """Imports of the heavy packages outside functions."""
    return [name for name in imports(ast.parse(source), top_only=True) if name.split(".")[0] in HEAVY]


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_a_module_of_the_house(path):
    source = path.read_text(encoding="utf-8")
    if part_of(path) != LAZY_IMPORTS:
        assert upward(part_of(path), source) == []
    assert heavy(source) == []


def test_every_part_has_its_floor():
    assert {part_of(path) for path in FILES} - {LAZY_IMPORTS} == FLOOR.keys()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "import transformers"),
        ("ops", "from tether.types import Batch"),
        ("types", "from tether.data.records import load_pairs"),
        ("algorithms", "from tether.runtime.directory import RunDirectory"),
        ("algorithms", "def f():\n    from tether import report"),
        ("algorithms", "import tether.config"),
        ("commands", "import tether"),
        ("commands", "from tether import Engine"),
        ("config", "from tether.flags import parse"),  # a neighbour
        ("rewards", "if True:\n    from tether.algorithms.ppo import step"),
    ],
)
def test_an_import_that_points_up_is_found(part, source):
    assert upward(part, source)


def test_imports_that_point_down_are_none_of_these():
    source = "import math\nimport torch\nfrom tether.ops import masked\nfrom tether.data.reading import Row\n"
    assert upward("models", source) == []
    assert upward("models", "from tether.models.policy import Critic") == []


def test_what_is_heavy_at_the_top_is_found():
    assert heavy("import pyarrow.parquet") == ["pyarrow.parquet"]
    assert heavy("try:\n    from peft import LoraConfig\nexcept ImportError:\n    pass") == ["peft.LoraConfig"]
    assert heavy("class A:\n    import datasets") == ["datasets"]
    assert heavy("def f():\n    import matplotlib") == []
