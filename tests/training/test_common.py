"""What training commands share: where errors say they occurred, and what stops a run between two steps."""

from __future__ import annotations

import os
import signal

import pytest

from tether.errors import DataError, GuardError, RewardError
from tether.stop_requests import Interrupted, asked, check, heeded
from tether.training.common import located


@pytest.mark.parametrize("kind", [RewardError, GuardError])
def test_an_error_in_a_step_says_which(kind):
    error = kind("it failed", hint="look at it")
    with pytest.raises(kind) as raised, located("ppo step 3"):
        raise error
    assert raised.value is error
    assert str(error) == "ppo step 3: it failed; look at it"


def test_an_error_that_says_where_says_so_within_the_step():
    with pytest.raises(GuardError, match=r"^ppo step 3: generation: it failed$"), located("ppo step 3"):
        raise GuardError("it failed", where="generation")
    with pytest.raises(GuardError, match=r"^ppo step 3: it failed$"), located("ppo step 3"):
        raise GuardError("it failed", where="ppo step 3")
    with pytest.raises(DataError, match=r"^it failed$"), located("ppo step 3"):
        raise DataError("it failed")  # has nothing to do with a step


def test_a_rank_among_others_heeds_a_signal_between_two_steps_only():
    with heeded(within_steps=False):
        os.kill(os.getpid(), signal.SIGTERM)
        check()
        assert asked() == "SIGTERM"
    with heeded():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            check()
    assert asked() == ""
