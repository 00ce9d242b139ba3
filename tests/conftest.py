"""Fixtures of all tests: tiny models made here, and the real data and model where they are available."""

from __future__ import annotations

import functools

import pytest
import torch

from tether.runtime import device
from tether.training import common
from tiny import ARCHITECTURES, SHARED, byte_tokenizer, make_model


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _speed_measured_once():
    """Every run measures the machine's FLOP/s; here all share one measurement per precision."""
    with pytest.MonkeyPatch.context() as patch:
        rate = functools.cache(device.matrix_rate)
        patch.setattr(device, "matrix_rate", rate)
        patch.setattr(common, "matrix_rate", rate)
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Directory of a tiny model of each architecture, by name."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny(tiny_models):
    """Directory of a tiny Llama."""
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def stories():
    """The real pretrained model of 260,032 parameters."""
    directory = SHARED / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("the pretrained model stories260K is not beside the checkout")
    return str(directory)


@pytest.fixture(scope="session")
def shared_data():
    directory = SHARED / "data"
    if not directory.is_dir():
        pytest.skip("the real data sets are not beside the checkout")
    return directory
