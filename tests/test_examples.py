"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import tether

SRC = Path(tether.__file__).parent


def test_the_examples_in_docstrings():
    modules = [path for path in sorted(SRC.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]
    assert len(modules) > 20
    for path in modules:
        name = ".".join(("tether", *path.relative_to(SRC).with_suffix("").parts))
        failed, tried = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
        assert tried, name
        assert not failed, name
