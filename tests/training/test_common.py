"""What training commands share: where errors say they occurred, and what stops a run between two steps."""

from __future__ import annotations

import os
import signal

import pytest

from tether.errors import DataError, GuardError, RewardError
from tether.stop_requests import Interrupted, asked, check, heeded
from tether.training.common import held_out_words, located


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


def test_a_run_that_was_compared_says_what_it_gained():
    def both(policy: float, reference: float, **more: float) -> dict:
        return {
            "policy": {"reward": policy, "reward_ci95": 0.123, **more},
            "reference": {"reward": reference, "reward_ci95": 0.1},
        }

    summary = {"evaluation": both(0.889, -0.207, kl=5.42), "eval_rewards": {"judge": both(5.1, 4.8)}}
    said = "held out: reward 0.889 ± 0.12 (reference -0.207), judge 5.1 ± 0.12 (reference 4.8), at 5.4 nats"
    assert held_out_words(summary) == [said]
    assert held_out_words({"evaluation": {}}) == held_out_words({"accuracy": 0.7}) == []
