"""The clock of a step."""

from __future__ import annotations

import time

import pytest
import torch

from tether.algorithms.phases import PhaseClock

CPU = torch.device("cpu")


def test_each_phase_has_its_own_seconds_and_adds_up():
    clock = PhaseClock(CPU)
    begun = time.perf_counter()
    for _ in range(2):
        with clock.phase("generate"):
            time.sleep(0.02)
    with clock.phase("score"):
        time.sleep(0.01)
    whole = time.perf_counter() - begun
    found = clock.metrics()
    assert list(found) == ["time/generate", "time/score"]
    assert found["time/generate"] >= 0.04
    assert found["time/score"] >= 0.01
    assert sum(found.values()) <= whole


def test_an_error_passes_through():
    clock = PhaseClock(CPU)
    with pytest.raises(RuntimeError, match="broken"), clock.phase("score"):
        raise RuntimeError("broken")
    assert list(clock.metrics()) == ["time/score"]  # it took its time


def test_on_cuda_a_phase_ends_when_the_device_is_done(monkeypatch):
    events = []
    monkeypatch.setattr("torch.cuda.synchronize", events.append)
    with PhaseClock(torch.device("cuda:0")).phase("update"):
        events.append("work")
    assert events == ["work", torch.device("cuda:0")]
