"""Reductions, and that cutting a step into parts never changes its gradient."""

import pytest
import torch

from tether.ops.reduce import fixed_length, length_mask, reduce_loss, sequence_mean, token_mean

X = torch.tensor([[1.0, 2.0, 3.0], [10.0, float("nan"), float("nan")]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_literals():
    assert token_mean(X, MASK, tokens=4).item() == 4  # 16 / 4
    assert sequence_mean(X, MASK, sequences=2).item() == 6  # (2 + 10) / 2
    assert fixed_length(X, MASK, sequences=2, max_length=4).item() == 2  # 16 / 8


def test_masks_come_from_lengths():
    assert length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("split", [[1] * 8, [3, 5], [2, 2, 4]])
def test_parts_add_up_to_the_whole(reduction, split):
    """With mixed lengths, where a mean of micro-batch means would be wrong."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 2, 7, 3, 3, 8, 5])
    mask = length_mask(lengths, 9)
    counts = {"reduction": reduction, "sequences": 8, "tokens": int(mask.sum()), "max_length": 9}
    weights = torch.randn(8, 9, dtype=torch.float64, requires_grad=True)
    whole = reduce_loss(weights.tanh(), mask, **counts)
    (expected,) = torch.autograd.grad(whole, weights)
    parts = [reduce_loss(w.tanh(), m, **counts) for w, m in zip(weights.split(split), mask.split(split), strict=True)]
    torch.testing.assert_close(sum(parts), whole)
    (found,) = torch.autograd.grad(sum(parts), weights)
    torch.testing.assert_close(found, expected)
    means = sum(
        reduce_loss(x.tanh(), m, reduction=reduction, sequences=len(m), tokens=int(m.sum()), max_length=9)
        for x, m in zip(weights.split(split), mask.split(split), strict=True)
    ) / len(split)
    if reduction == "token_mean":
        assert (means - whole).abs() > 1e-3  # the error this guards against is not a small one


def test_equal_lengths_make_all_three_agree():
    x, mask = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    values = [
        reduce_loss(x, mask, reduction=reduction, sequences=4, tokens=20, max_length=5)
        for reduction in ("sequence_mean", "token_mean", "fixed_length")
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[1], values[2])
