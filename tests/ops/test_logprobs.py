"""Log-probs and entropy, from logits and in chunks from hidden states."""

import math

import pytest
import torch

from tether.ops.logprobs import chunked_logprobs, token_entropy, token_logprobs


def test_literals():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.75))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert token_entropy(logits).item() == pytest.approx(expected)


def test_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 2 * math.log(3.0)]])
    assert token_logprobs(logits, torch.tensor([0]), temperature=2.0).item() == pytest.approx(math.log(0.25))
    assert token_entropy(logits, temperature=1e6).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_probabilities_of_all_tokens_add_up_to_one():
    logits = torch.randn(4, 11) * 5
    ids = torch.arange(11).expand(4, 11)
    total = token_logprobs(logits.unsqueeze(1).expand(4, 11, 11), ids, temperature=0.7).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(4))


def test_entropy_is_minus_the_expected_logprob_by_a_loop():
    logits = torch.randn(3, 5)
    for row, entropy in zip(logits, token_entropy(logits), strict=True):
        p = [math.exp(v) for v in row.tolist()]
        z = sum(p)
        assert entropy.item() == pytest.approx(-sum(q / z * math.log(q / z) for q in p), abs=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.randn(2, 50_000).bfloat16()
    ids = torch.tensor([3, 70])
    assert token_logprobs(logits, ids).dtype == torch.float32
    torch.testing.assert_close(token_logprobs(logits, ids), logits.double().log_softmax(-1)[[0, 1], ids].float())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_same_values_and_gradients(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, requires_grad=True)
    weight = torch.randn(13, 6, requires_grad=True)
    ids = torch.randint(13, (10,))
    coefficients = torch.randn(2, 10)

    def gradients(logp, entropy):
        return torch.autograd.grad((coefficients[0] * logp + coefficients[1] * entropy).sum(), (hidden, weight))

    logits = hidden @ weight.T
    whole = token_logprobs(logits, ids, temperature=1.3), token_entropy(logits, temperature=1.3)
    parts = chunked_logprobs(hidden, ids, lambda h: h @ weight.T, temperature=1.3, chunk=chunk)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(*parts), gradients(*whole))


def test_no_tokens_at_all():
    logp, entropy = chunked_logprobs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), lambda h: h)
    assert logp.shape == entropy.shape == (0,)
