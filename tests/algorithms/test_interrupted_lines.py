"""A real SIGINT at the lines of a step, in tether and in the optimizer; outside of a run it is a KeyboardInterrupt."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

import tether
from interrupting import CONFIGS, PROMPTS, Setting, load, reported, same

TRACED = (str(Path(tether.__file__).parent), str(Path(torch.__file__).parent / "optim"))


def traced(call, seen):
    """What ``call()`` returns; ``seen(place)`` is called before each line that runs in the traced files."""

    def in_frame(frame, event, _):
        if event == "line":
            seen((frame.f_code.co_filename, frame.f_lineno))
        return in_frame

    def in_call(frame, *_):
        return in_frame if frame.f_code.co_filename.startswith(TRACED) else None

    before = sys.gettrace()
    sys.settrace(in_call)
    try:
        return call()
    finally:
        sys.settrace(before)


def signalled(setting, place):
    """A step in which SIGINT arrives when the line at ``place`` runs for the last time but one, or the only time."""
    left = [place[1]]

    def seen(found):
        if found == place[0]:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        traced(lambda: setting.step(PROMPTS), seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_signal_at_any_line_of_a_step_leaves_a_state_that_resumes_to_the_same_bits(name, tiny, monkeypatch):
    loaded = load(tiny)
    whole, passed = Setting(name, loaded, monkeypatch), []
    expected = reported(traced(lambda: whole.step(PROMPTS), passed.append))
    counts = {place: passed.count(place) for place in dict.fromkeys(passed)}
    places = [(place, max(1, count - 1)) for place, count in counts.items()]
    assert len(places) > 300
    resumed = 0
    for place in places[:: max(1, len(places) // 60)]:
        setting = Setting(name, loaded, monkeypatch)
        signalled(setting, place)
        if (setting.state.round if name == "rejection-sampling" else setting.state.step) == 0:
            resumed += setting.state.update is not None
            assert reported(setting.step(PROMPTS)) == expected, place
        assert same(setting.held(), whole.held()), place
    assert resumed > 10
