"""The generator of two turns agrees with its enumeration and with the model."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from enumerable import EOS, PROMPT, tiny_llama
from tether.types import Prompt, Sampling, make_requests
from two_turns import TwoTurns, answer, trajectories

VOCAB = 8


def test_the_trajectories_by_hand():
    found = dict(trajectories(VOCAB, 1))
    assert len(found) == 1 + 7 * 8
    assert found[(EOS,)] == (True,)
    assert found[(4, 7, 2)] == (True, False, True)
    assert found[(3, 6, 6, EOS)] == (True, False, False, True)
    assert len(dict(trajectories(VOCAB, 2))) == 1 + 7 + 7 * 7 * (1 + 7 * 8)


def token_logprobs(model, ids, mask):
    """Of each token that the policy emitted, by the model's own forward pass; 0 elsewhere."""
    with torch.no_grad():
        logp = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return [float(row[token]) if emitted else 0.0 for row, token, emitted in zip(logp, ids, mask, strict=True)]


@pytest.mark.parametrize("turn", [1, 2])
def test_completions_are_trajectories_with_the_models_logprobs(turn):
    model = tiny_llama(VOCAB)
    asked = make_requests([Prompt(ids=PROMPT, text="")] * 2, group_size=100, seed=0)
    groups = TwoTurns(model).generate(asked, sampling=Sampling(max_new_tokens=turn))
    masks = dict(trajectories(VOCAB, turn))
    drawn = {c.ids: c for group in groups for c in group.completions}
    assert len({len(ids) for ids in drawn}) >= 3
    for ids, completion in drawn.items():
        assert completion.mask == masks[ids]
        assert completion.sampler_logp == pytest.approx(token_logprobs(model, ids, masks[ids]), abs=1e-5)


def test_every_trajectory_is_drawn_as_often_as_the_model_says():
    model, count = tiny_llama(VOCAB), 4000
    (group,) = TwoTurns(model).generate(
        make_requests([Prompt(ids=PROMPT, text="")], group_size=count, seed=1), sampling=Sampling(max_new_tokens=1)
    )
    drawn = Counter(completion.ids for completion in group.completions)
    found = trajectories(VOCAB, 1)
    probabilities = [math.exp(sum(token_logprobs(model, ids, mask))) for ids, mask in found]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert sum(drawn[ids] for ids, _ in found) == count
    for (ids, _), p in zip(found, probabilities, strict=True):
        assert abs(drawn[ids] - count * p) < 5 * (count * p * (1 - p)) ** 0.5 + 1


def test_the_environment_depends_on_what_was_emitted():
    assert len({answer((token,)) for token in range(VOCAB)}) > 4
