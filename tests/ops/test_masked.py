"""Statistics over real tokens."""

import pytest
import torch

from tether.ops.masked import masked_mean, masked_sum, masked_var, rescale, whiten

NAN = float("nan")
X = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
EMPTY_ROW = torch.tensor([[True, True, False], [False, False, False]])


def test_literals_and_that_padding_may_hold_nan():
    assert masked_sum(X, MASK) == 7
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 4]
    assert masked_mean(X, MASK).item() == pytest.approx(7 / 3)
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4]
    # mean 7/3; squared distances 16/9, 1/9, 25/9
    assert masked_var(X, MASK).item() == pytest.approx(42 / 9 / 3)
    assert masked_var(X, MASK, unbiased=True).item() == pytest.approx(42 / 9 / 2)


def test_a_row_without_tokens_has_mean_zero():
    assert masked_mean(X, EMPTY_ROW, dim=1).tolist() == [1.5, 0]


def test_no_gradient_reaches_padding():
    x = torch.randn(2, 3, requires_grad=True)
    masked_mean(x, MASK).backward()
    assert torch.equal(x.grad != 0, MASK)


TABLE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
ALL = torch.ones(3, 3, dtype=torch.bool)
BIASED = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
UNBIASED = torch.tensor([[0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9651], [2.3303, 2.6954, 3.0606]])


@pytest.mark.parametrize(("unbiased", "expected"), [(False, BIASED), (True, UNBIASED)])
def test_whitening_table_with_the_mean_added_back(unbiased, expected):
    torch.testing.assert_close(whiten(TABLE, ALL, unbiased=unbiased) + 1.6, expected, atol=1e-4, rtol=0)


def test_rescaling_divides_and_does_not_shift():
    """The variance of the table is .0667, that of the numbers 0, 3, 3 is 2; padding weighs nothing."""
    torch.testing.assert_close(rescale(TABLE, ALL), TABLE / (0.06 / 0.9) ** 0.5, rtol=1e-5, atol=0)
    x, mask = torch.tensor([[0.0, 3.0, 3.0, NAN]]), torch.tensor([[True, True, True, False]])
    assert rescale(x, mask)[0].tolist() == pytest.approx([0.0, 3 / 2**0.5, 3 / 2**0.5, 0.0])


def test_rescaled_rewards_do_not_pay_for_length():
    """Completions that are worth the same stay worth the same, whatever their lengths; with a shift they would not."""
    mask = torch.arange(16) < torch.tensor([[1], [4], [16]])
    rewards = torch.zeros(3, 16)
    for row, length in enumerate((1, 4, 16)):
        rewards[row, length - 1] = 1.0
    worth = rescale(rewards, mask).sum(1)
    assert worth.tolist() == pytest.approx([worth[0].item()] * 3)
    shifted = torch.where(mask, whiten(rewards, mask) + rewards[mask].mean(), 0.0).sum(1)
    assert shifted[0] - shifted[2] > 3


def test_whitened_tokens_have_mean_zero_and_variance_one_and_padding_is_zero():
    x = torch.randn(5, 7) * 3 + 2
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [2], [6]])
    padded = torch.where(mask, x, NAN)
    white = whiten(padded, mask)
    real = white[mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-6)
    assert real.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()
    loop = [(v - x[mask].mean()) / (x[mask].var(unbiased=False) + 1e-8) ** 0.5 for v in x[mask]]
    torch.testing.assert_close(real, torch.stack(loop))
