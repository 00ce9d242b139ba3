"""Models to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def broken(tmp_path, tiny_models):
    """A copy of a tiny model to break: ``broken("qwen2")`` is its directory."""

    def copy(architecture="llama") -> Path:
        return Path(shutil.copytree(tiny_models[architecture], tmp_path / "model"))

    return copy
