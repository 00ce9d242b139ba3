"""Imports point down only, heavy packages are imported where they are used, and files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "tether"

LAYERS = (
    ("ops",),
    ("errors", "seeds", "hub", "world", "commands", "names", "presets"),
    ("stop_requests", "durations", "untrusted", "event_loop"),
    ("types",),
    ("observers", "digests"),
    ("figures", "statistics", "data", "monitor", "annotator"),
    ("models",),
    ("generation",),
    ("rewards",),
    ("environments", "labellers"),
    ("algorithms", "runtime"),
    ("evaluation",),
    ("report",),
    ("trackers",),
    ("config", "flags"),
    ("training",),
    ("looking", "doctor", "quickstart", "maze", "resume", "serve"),
    ("api",),
    ("dpo", "grpo", "ppo", "rejection_sampling", "reward_model", "sft"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up. A module imports from lower layers and from its own package, not from its neighbours. The table
of commands names modules of higher layers as text, and imports none."""
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "datasets", "peft", "matplotlib", "vaderSentiment", "pyarrow", "tensorboard", "wandb", "trackio", "mlflow",
    "IPython", "starlette", "uvicorn", "math_verify", "latex2sympy2_extended", "sympy", "jsonschema", "referencing",
}  # fmt: skip
LAZY_IMPORTS = "__init__"
"""The package itself names what Python users import from it, and imports it when they do."""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
"""Lines."""
LONGER = {
    "models/packing.py:pack": "fills four parallel lists in one pass, which parts of it would have to hand around",
}
"""Files, and functions as FILE:NAME, that may be longer, each with its reason."""


def part_of(path: Path) -> str:
    """The package or the module directly below ``tether`` that a file belongs to."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """The dotted names that are imported, ``from a import b`` as ``a.b``; with ``top_only``, none in functions
    and none that are for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node))):
            yield from imports(node, top_only=top_only)


def is_for_types(node: ast.AST) -> bool:
    """Whether a block is never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upward(part: str, source: str) -> list[str]:
    """Imports of ``part`` that do not point down."""
    found = []
    for name in imports(ast.parse(source)):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "tether" and target not in (part, "__version__") and LAYER.get(target, len(LAYERS)) >= LAYER[part]:
            found.append(name)
        if part == "ops" and root not in (
            "torch",
            "tether",
            "__future__",
            "math",
            "fractions",
            "typing",
            "collections",
            "dataclasses",
        ):
            found.append(name)
    return found


def heavy(source: str) -> list[str]:
    """Imports of the heavy packages outside functions."""
    return [name for name in imports(ast.parse(source), top_only=True) if name.split(".")[0] in HEAVY]


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_a_module_imports_from_lower_layers_and_nothing_heavy(path):
    source = path.read_text(encoding="utf-8")
    if part_of(path) != LAZY_IMPORTS:
        assert upward(part_of(path), source) == []
    assert heavy(source) == []


def test_every_part_has_its_layer():
    assert {part_of(path) for path in FILES} - {LAZY_IMPORTS} == LAYER.keys()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "import transformers"),
        ("ops", "from tether.types import Batch"),
        ("types", "from tether.data.records import load_pairs"),
        ("algorithms", "from tether.runtime.directory import RunDirectory"),  # a neighbour
        ("runtime", "from tether.algorithms import ppo"),
        ("monitor", "from tether.runtime.recorder import Recorder"),
        ("data", "from tether.figures import Mean"),
        ("world", "from tether.types import Metrics"),
        ("config", "from tether.training.ppo import PPO"),
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
    assert heavy("if TYPE_CHECKING:\n    import matplotlib") == []
    assert heavy("if True:\n    import matplotlib") == ["matplotlib"]


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and lines of every function, decorators aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def too_long(name: str, source: str) -> list[str]:
    """The file ``name`` and its functions, as far as they are too long and nothing excuses it."""
    found = [name] if len(source.splitlines()) > LONGEST_FILE else []
    found += [f"{name}:{inner}" for inner, lines in functions(ast.parse(source)) if lines > LONGEST_FUNCTION]
    return [one for one in found if one not in LONGER]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_files_and_functions_are_not_too_long(path):
    assert too_long(str(path.relative_to(SRC)), path.read_text(encoding="utf-8")) == []


def test_what_is_too_long_is_found():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert too_long("a.py", f"class A:\n  def f():\n{body}") == ["a.py:f"]
    assert too_long("a.py", "x = 1\n" * (LONGEST_FILE + 1)) == ["a.py"]
    assert too_long("models/packing.py", f"def pack():\n{body}") == []


def test_no_excuse_is_out_of_date():
    for name in LONGER:
        file, _, function = name.partition(":")
        source = (SRC / file).read_text(encoding="utf-8")
        assert (
            max(lines for inner, lines in functions(ast.parse(source)) if inner == function) > LONGEST_FUNCTION
            if function
            else len(source.splitlines()) > LONGEST_FILE
        )
