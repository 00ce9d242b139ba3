"""Log-probs and entropy, from logits and in chunks from hidden states."""

import math

import pytest
import torch

from tether.models.dry_run import Allocated
from tether.ops import logprobs
from tether.ops.logprobs import TokenSoftmax, chunked_logprobs, token_entropy, token_logprobs


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


def soft_capped(weight):
    return lambda h: 5 * torch.tanh(h @ weight.T / 5)


def linear(weight):
    return lambda h: h @ weight.T


@pytest.mark.parametrize("projection", [linear, soft_capped])
@pytest.mark.parametrize("logit_bytes", [1, 4 * 13 * 3, 10_000], ids=["a row", "three rows", "kept"])
@pytest.mark.parametrize("block_bytes", [1, 2**20], ids=["blocks of a row", "one block"])
def test_the_same_values_and_gradients_as_from_all_logits(projection, logit_bytes, block_bytes, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNKS", 2)
    monkeypatch.setattr(logprobs, "CACHE_BYTES", block_bytes)
    hidden = torch.randn(10, 6, requires_grad=True)
    weight = torch.randn(13, 6, requires_grad=True)
    ids = torch.randint(13, (10,))
    a, b = torch.randn(2, 10)
    project = projection(weight)

    def gradients(value):
        hidden.grad = weight.grad = None
        value.sum().backward(retain_graph=True)
        return hidden.grad, weight.grad

    logits = project(hidden)
    logp, entropy = token_logprobs(logits, ids, temperature=1.3), token_entropy(logits, temperature=1.3)
    parts = chunked_logprobs(hidden, ids, project, temperature=1.3, entropy=True, logit_bytes=logit_bytes)
    (alone,) = chunked_logprobs(hidden, ids, project, temperature=1.3, logit_bytes=logit_bytes)
    torch.testing.assert_close(parts, (logp, entropy))
    torch.testing.assert_close(alone, logp)
    for _ in range(2):  # a backward pass leaves the graph as it was
        torch.testing.assert_close(gradients(a * parts[0] + b * parts[1]), gradients(a * logp + b * entropy))
        torch.testing.assert_close(gradients(a * parts[0]), gradients(a * logp))
        torch.testing.assert_close(gradients(b * parts[1]), gradients(b * entropy))
        torch.testing.assert_close(gradients(a * alone), gradients(a * logp))


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_by_finite_differences(entropy, temperature):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 6, 2])
    assert torch.autograd.gradcheck(lambda x: TokenSoftmax.apply(x, ids, temperature, entropy), (logits,))


@pytest.mark.parametrize("logit_bytes", [1, 10**9], ids=["chunks", "kept"])
def test_bfloat16_states_and_weights(logit_bytes):
    """The results are float32, and as near to those of float32 as the rounded logits are."""
    hidden = torch.randn(40, 16).bfloat16().requires_grad_()
    weight = torch.randn(300, 16).bfloat16().requires_grad_()
    ids = torch.randint(300, (40,))
    found = chunked_logprobs(hidden, ids, linear(weight), entropy=True, logit_bytes=logit_bytes)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    logits = linear(exact[1])(exact[0])
    assert all(x.dtype == torch.float32 for x in found)
    torch.testing.assert_close(found[0], token_logprobs(logits, ids), atol=0.1, rtol=0.01)
    torch.testing.assert_close(found[1], token_entropy(logits), atol=0.1, rtol=0.01)
    sum(found).sum().backward()
    got = (hidden.grad, weight.grad)
    wanted = torch.autograd.grad((token_logprobs(logits, ids) + token_entropy(logits)).sum(), exact)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("entropy", [False, True])
def test_a_large_vocabulary_takes_a_tenth_of_its_logits_at_most(entropy):
    """Beside the inputs, the results and the two gradients."""
    n, vocab = 512, 151_936
    peaks = {}
    with Allocated() as allocated:
        hidden = torch.randn(n, 16, requires_grad=True)
        weight = torch.randn(vocab, 16, requires_grad=True)
        ids = torch.randint(vocab, (n,))
        before = allocated.now
        with allocated.at_most(peaks, "forward"):
            figures = chunked_logprobs(hidden, ids, linear(weight), entropy=entropy)
        with allocated.at_most(peaks, "backward"):
            sum(figures).sum().backward()
        gradients = weight.grad.nbytes + hidden.grad.nbytes
        assert allocated.now >= before + gradients  # what is counted last is there
    full = 4 * n * vocab
    assert 0 < peaks["forward"] <= full / 10
    assert peaks["backward"] - gradients <= full / 10


@pytest.mark.parametrize("grad", [True, False])
def test_few_logits_are_made_once(grad):
    """What fits is kept; what does not is made again in the backward pass, and only there."""
    calls = []
    weight = torch.randn(8, 4, requires_grad=grad)

    def project(h):
        calls.append(len(h))
        return h @ weight.T

    for logit_bytes in (4 * 8 * 64, 4 * 8 * 64 - 1):
        (logp,) = chunked_logprobs(torch.randn(64, 4), torch.randint(8, (64,)), project, logit_bytes=logit_bytes)
        if grad:
            logp.sum().backward()
    parts = [2] * 32
    assert calls == [0, 64, 0, *parts, *(parts[::-1] if grad else [])]


def test_no_tokens_at_all():
    logp, entropy = chunked_logprobs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), lambda h: h, entropy=True)
    assert logp.shape == entropy.shape == (0,)


@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_an_impossible_token_adds_nothing_to_the_entropy_or_its_gradient(kind):
    """A logit of -inf, as of a token that is masked out: entropy log 2 of the other two, and no NaN in the gradient."""
    logits = torch.tensor([[0.3, 0.3, -math.inf]], requires_grad=True)
    if kind == "whole":
        entropy = token_entropy(logits)
    else:
        _, entropy = TokenSoftmax.apply(logits, torch.tensor([0]), 1.0, True)
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)
