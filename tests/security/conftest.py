"""A workspace per test, and a model in it that can be made hostile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commandline import workspace


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture
def model(here, tiny):
    return Path(shutil.copytree(tiny, here / "m"))
