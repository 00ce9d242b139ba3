"""Short runs with trackers, in a directory of their own and without a network."""

from __future__ import annotations

import pytest

from commandline import workspace


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working directory, with small data; no tracker is told by the environment to go elsewhere."""
    workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
