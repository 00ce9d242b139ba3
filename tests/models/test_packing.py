"""Packed groups against padded rows: the same states and the same gradients, on every architecture."""

from __future__ import annotations

import pytest
import torch

from helpers import gradient, relative_error
from tether.models import packing
from tether.models.loading import load_policy
from tether.models.packing import Group, in_blocks, pack, ranges
from tether.models.policy import completion_states, final_states, padded_states
from tether.types import Batch
from tiny import ARCHITECTURES


def rows(seed=0):
    """A group of three, one of two, two prompts alone, a completion of one token; prompts beyond the sliding window."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 260, (n,), generator=generator).tolist()

    first, second, third, fourth = ids(9), ids(4), ids(1), ids(12)
    return [
        (first, ids(7)),
        (second, ids(1)),
        (third, ids(11)),
        (first, ids(1)),
        (second, ids(10)),
        (first, ids(4)),
        (fourth, ids(2)),
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request, tiny_models):
    return load_policy(tiny_models[request.param])[0]


def objective(states):
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    return (states.square() * weight).sum()


def gradient_of(policy, states):
    policy.zero_grad()
    loss = objective(states)
    loss.backward()
    return gradient(policy).clone()


def test_packed_states_and_gradients_are_the_padded_ones(policy):
    batch = Batch.collate(rows())
    packed, padded = completion_states(policy.base_model, batch), padded_states(policy.base_model, batch)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    assert relative_error(gradient_of(policy, packed), gradient_of(policy, padded)) < 1e-5


def test_states_are_those_of_the_emitted_tokens(policy):
    """Tokens of an environment, first, in between and last, are run as context; no state is gathered for them."""
    generator = torch.Generator().manual_seed(6)
    masks = [(torch.rand(len(completion), generator=generator) < 0.6).tolist() for _, completion in rows()]
    batch = Batch.collate(rows(), masks=masks)
    everywhere = completion_states(policy.base_model, Batch.collate(rows()))
    emitted = torch.tensor([own for mask in masks for own in mask])
    assert 0 < emitted.sum() < len(emitted)
    packed, padded = completion_states(policy.base_model, batch), padded_states(policy.base_model, batch)
    assert torch.equal(packed, everywhere[emitted])
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    assert relative_error(gradient_of(policy, packed), gradient_of(policy, padded)) < 1e-5


def test_the_order_of_rows_does_not_matter(policy):
    shuffled = [5, 2, 0, 6, 4, 3, 1]
    batch = Batch.collate(rows())
    together = completion_states(policy.base_model, batch).split(batch.completion_lengths.tolist())
    other = batch.rows(torch.tensor(shuffled))
    apart = completion_states(policy.base_model, other).split(other.completion_lengths.tolist())
    for place, row in enumerate(shuffled):
        torch.testing.assert_close(apart[place], together[row], rtol=1e-4, atol=1e-4)


def test_last_states_are_those_of_each_row_alone(policy):
    batch = Batch.collate(rows())
    found = final_states(policy.base_model, batch)
    for (prompt, completion), state in zip(rows(), found, strict=True):
        alone = policy.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)


def test_every_distinct_token_is_run_once():
    batch = Batch.collate([([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12]), ([13, 14], [15, 16])])
    packed = pack(batch, ends=False)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 10, 11, 13, 14, 15]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert packed.states.tolist() == [2, 3, 2, 4, 5, 7, 8]
    group, single = packed.layout.blocks
    assert (group.trunks, group.branches) == ((1, 3), (1, 2, 2))
    assert (single.trunks, single.branches) == ((1, 3), (1, 0, 0))
    assert packed.layout.grids.tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 7, 8]
    assert packed.layout.places.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    whole = pack(batch, ends=True)
    assert whole.ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert whole.ends.tolist() == [4, 7, 11]


def test_blocks_hold_groups_of_like_size(monkeypatch):
    monkeypatch.setattr(packing, "SMALL", 0)
    sizes = [(100, [10, 12]), (96, [12, 3]), (30, [10, 10]), (50, []), (48, []), (9, [])]
    groups = [Group([], trunk, branches) for trunk, branches in sizes]
    blocks = in_blocks(groups)
    assert [[group.trunk for group in block] for block in blocks] == [[100, 96], [30], [50, 48], [9]]
    for block in blocks:
        trunk, width = max(g.trunk for g in block), max(g.width for g in block)
        assert sum(g.scores(trunk, width) for g in block) <= 1.25 * sum(g.scores(g.trunk, g.width) for g in block)
    monkeypatch.setattr(packing, "SMALL", 10**9)
    assert [len(block) for block in in_blocks(groups)] == [3, 3]


def test_ranges():
    assert ranges([4, 0, 7], [2, 0, 3]).tolist() == [4, 5, 7, 8, 9]


@pytest.mark.parametrize("small", [0, 2**18])
def test_it_does_not_matter_how_groups_are_put_into_blocks(tiny, small, monkeypatch):
    monkeypatch.setattr(packing, "SMALL", small)
    policy = load_policy(tiny)[0]
    batch = Batch.collate([*rows(), ([5, 6, 7], [8])])
    packed, padded = completion_states(policy.base_model, batch), padded_states(policy.base_model, batch)
    assert len(pack(batch, ends=False).layout.blocks) == (3 if small else 4)
    assert relative_error(gradient_of(policy, packed), gradient_of(policy, padded)) < 1e-5


def test_the_models_own_attention_is_back_afterwards(policy):
    before = policy.config._attn_implementation
    completion_states(policy.base_model, Batch.collate(rows()))
    assert policy.config._attn_implementation == before != "tether"


EMPTY = [([], [5, 6, 7]), ([8, 9], [10]), ([], [11]), ([8, 9], [12, 13, 14]), ([], [5, 15, 16, 17, 18])]


@pytest.mark.parametrize("rows", [EMPTY, EMPTY[:1], EMPTY[::2], [([], [5]), ([], [6])]])
def test_rows_of_a_prompt_without_a_token_are_sequences_of_their_own(policy, rows):
    batch = Batch.collate(rows)
    found = final_states(policy.base_model, batch)
    for (prompt, completion), state in zip(rows, found, strict=True):
        alone = policy.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-4)
    gradient_of(policy, final_states(policy.base_model, batch))
    assert pack(batch, ends=True).ids.numel() == sum(len(c) for _, c in rows) + 2 * any(p for p, _ in rows)


def test_no_state_predicts_the_first_token_behind_a_prompt_without_one():
    with pytest.raises(ValueError, match="no state that predicts"):
        pack(Batch.collate(EMPTY), ends=False)
