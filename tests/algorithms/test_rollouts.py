"""What a generator gives is checked against what it was asked for."""

from __future__ import annotations

import pytest
import torch

from enumerable import tiny_llama
from helpers import FunctionScorer, group
from tether.algorithms.phases import PhaseClock
from tether.algorithms.rollouts import roll_out
from tether.errors import TetherError
from tether.types import Prompt, Sampling

PROMPTS = [Prompt(ids=(0, 5), text="a"), Prompt(ids=(0, 6), text="b")]
RIGHT = [group((0, 5), [(7, 1), (4, 1)]), group((0, 6), [(7, 1), (4, 1)])]


class Canned:
    """A Generator that gives what it was made with."""

    def __init__(self, groups):
        self.groups = groups

    def generate(self, requests, *, sampling):
        return self.groups


def rolled_out(groups):
    return roll_out(
        PROMPTS,
        generator=Canned(groups),
        scorer=FunctionScorer(lambda *_: 1.0),
        group_size=2,
        policy=tiny_llama(8),
        sampling=Sampling(),
        seed=0,
        first=0,
        clock=PhaseClock(torch.device("cpu")),
    )


def test_one_group_per_request_is_taken():
    assert [one.rollouts for one in rolled_out(RIGHT)] == RIGHT


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (RIGHT[:1], "gave 1 groups for 2 requests"),
        (RIGHT[::-1], "another prompt's completions for request 0"),
        ([RIGHT[0], group((0, 6), [(7, 1)])], "gave 1 completions for the 2 seeds of request 1"),
        ([RIGHT[0], group((0, 6), [(7, 1), (7, 8, 1)])], "token id 8 for request 1, .* ids from 0 to 7 alone"),
        ([group((0, 5), [(7, 1), (-1, 1)]), RIGHT[1]], "token id -1 for request 0"),
        ([RIGHT[0], group((0, 6), [(7, 1), (7,) * 15])], "request 1 with which it has 17 tokens, .* context is 16"),
    ],
)
def test_anything_else_is_refused(groups, message):
    with pytest.raises(TetherError, match=message):
        rolled_out(groups)
