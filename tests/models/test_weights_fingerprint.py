"""A model's fingerprint: the same for the same bits, another for any other."""

from __future__ import annotations

import copy

import pytest
import torch

from tether.models.fingerprint import CHUNK, bit_sums, weights_fingerprint
from tether.models.loading import load_policy


def test_by_hand():
    assert bit_sums(torch.tensor([1, 2, 3])) == [6, 6]
    words = torch.zeros(2 * CHUNK + 1, dtype=torch.int64)
    words[0], words[CHUNK], words[-1] = 5, 7, 11
    assert bit_sums(words) == [23, 5 + 2 * 7 + 3 * 11]
    assert bit_sums(torch.tensor([1, 2, 3], dtype=torch.uint8)) == [0, 0, 1, 2, 3]
    assert bit_sums(torch.empty(0)) == [0, 0]


def test_it_does_not_depend_on_where_the_bits_lie():
    weight = torch.randn(40, 1000)
    shifted = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(40, 1000)
    assert bit_sums(weight) == bit_sums(shifted) == bit_sums(weight.T.contiguous().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_one_weight_makes_another_fingerprint(tiny, dtype):
    model, _ = load_policy(tiny, dtype=dtype)
    other = copy.deepcopy(model)
    assert weights_fingerprint(model) == weights_fingerprint(other)
    last = list(other.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] = torch.nextafter(last.view(-1)[-1], torch.tensor(9.0, dtype=dtype))
    assert weights_fingerprint(model) != weights_fingerprint(other)


def test_another_order_of_distant_weights_is_seen():
    one = torch.arange(3 * CHUNK)
    other = one.clone()
    other[[0, -1]] = one[[-1, 0]]
    assert bit_sums(one) != bit_sums(other)
