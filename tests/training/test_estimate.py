"""What a run says of its memory, when it begins and at its end."""

from __future__ import annotations

import re

import pytest
import torch

from commandline import tether, workspace
from runs import LINES
from tether.training import estimate, footprint
from tether.training.footprint import Footprint
from tether.training.step_time import Amounts

GIB = 2**30
FIRST = re.compile(r"^memory: ([\d.]+) GiB expected at the peak, in the (\w+) \(process [\d.]+", re.MULTILINE)
LAST = re.compile(r"; memory ([\d.]+) GiB at the peak, [+-]\d+% expected", re.MULTILINE)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", LINES)
def test_every_command_says_what_it_expects(name, tiny, capfd):
    assert tether(f"{LINES[name]} --model {tiny} --out out") == 0
    said = capfd.readouterr().err
    assert FIRST.search(said)
    assert tether(f"{LINES[name]} --model {tiny} --quiet --out quiet") == 0
    assert "memory" not in capfd.readouterr().err


def test_the_end_says_how_wrong_that_was_where_the_run_reached_a_peak_of_its_own(tiny, capfd, monkeypatch):
    peaks = iter(range(1, 100))
    monkeypatch.setattr("tether.runtime.recorder.peak_gib", lambda _: 1.0)
    monkeypatch.setattr("tether.runtime.costs.peak_gib", lambda _: float(next(peaks)))
    assert tether(f"{LINES['sft']} --model {tiny} --out out") == 0
    assert LAST.search(capfd.readouterr().err)[1] == "16.00"
    monkeypatch.setattr("tether.runtime.costs.peak_gib", lambda _: 1.0)
    assert tether(f"{LINES['sft']} --model {tiny} --out again") == 0
    assert not LAST.search(capfd.readouterr().err)


def test_a_run_goes_on_where_no_estimate_can_be_made(tiny, capfd, monkeypatch):
    def looks(*_args, **_more):
        return torch.zeros(()).item()

    monkeypatch.setattr(footprint, "batch_of", looks)
    assert tether(f"{LINES['sft']} --model {tiny} --out out") == 0
    said = capfd.readouterr().err
    assert "memory: LlamaConfig: its memory cannot be estimated (" in said
    assert "done in" in said


def test_too_little_memory_in_words():
    found = Footprint(
        process=GIB,
        held={"weights": 2 * GIB, "optimizer": 4 * GIB},
        phases={"sampling": GIB, "update": 3 * GIB},
        update={"activations": 2 * GIB, "logits": 0, "gradients": GIB},
        amounts=Amounts(),
    )
    usual = (
        "memory: 10.00 GiB expected at the peak, in the update (process 1.00, weights 2.00, optimizer 4.00, "
        "activations 2.00, gradients 1.00)"
    )
    assert estimate.sentence(found, "ppo", None) == usual
    assert estimate.sentence(found, "ppo", 7 * GIB) == usual  # process and weights are there already
    assert estimate.sentence(found, "ppo", 5 * GIB) == (
        f"{usual}; 2.00 more than there is: 'tether doctor --method ppo' says what to change"
    )
