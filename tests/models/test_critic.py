"""The policy's forward pass over a batch, and the values beside it."""

import pytest
import torch

from tether.models.loading import load_policy
from tether.models.policy import (
    Critic,
    completion_logprobs,
    completion_states,
    logprobs_of_states,
    unflatten,
)
from tether.types import Batch
from tiny import ARCHITECTURES

ROWS = [((0, 10, 11), (12, 13, 1)), ((0, 20), (21, 22, 23, 24, 25, 26, 27, 28, 1)), ((0,), (40,))]


@pytest.fixture(params=ARCHITECTURES)
def policy(request, tiny_models):
    return load_policy(tiny_models[request.param])[0]


def test_logprobs_by_a_loop(policy):
    """Row by row, without padding, through the model's own logits."""
    logp, entropy = completion_logprobs(policy, Batch.collate(ROWS), temperature=0.7, entropy=True)
    assert logp.shape == entropy.shape == (3, 9)
    for i, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double() / 0.7
        for t, token in enumerate(completion):
            distribution = logits[len(prompt) + t - 1].log_softmax(-1)
            assert logp[i, t].item() == pytest.approx(distribution[token].item(), abs=2e-5)
            assert entropy[i, t].item() == pytest.approx(-(distribution.exp() @ distribution).item(), abs=2e-5)
        assert (logp[i, len(completion) :] == 0).all()
        assert (entropy[i, len(completion) :] == 0).all()


def test_unflatten():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert unflatten(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1, 2, 0], [3, 0, 0]]


@pytest.mark.parametrize("own_trunk", [True, False])
def test_values_start_at_zero(policy, own_trunk):
    batch = Batch.collate(ROWS)
    values = Critic(policy, own_trunk=own_trunk)(batch, lambda: completion_states(policy.base_model, batch))
    assert values.shape == batch.mask.shape
    assert values.dtype == torch.float32
    assert (values == 0).all()


@pytest.mark.parametrize("own_trunk", [True, False])
def test_values_by_a_loop(policy, own_trunk):
    """V(s_t) is read at the token before token t, and where the row's padding begins it is 0."""
    critic = Critic(policy, own_trunk=own_trunk)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.constant_(critic.head.bias, 0.5)
    batch = Batch.collate(ROWS)
    values = critic(batch, lambda: completion_states(policy.base_model, batch))
    for i, (prompt, completion) in enumerate(ROWS):
        for t in range(len(completion)):
            seen = torch.tensor([[*prompt, *completion[:t]]])
            with torch.no_grad():
                state = policy.base_model(input_ids=seen).last_hidden_state[0, -1]
                expected = critic.head(state).item()
            assert values[i, t].item() == pytest.approx(expected, abs=1e-3, rel=1e-4)
        assert (values[i, len(completion) :] == 0).all()


def test_own_trunk_moves_apart_from_the_policy(tiny):
    policy, _ = load_policy(tiny)
    critic = Critic(policy, own_trunk=True)
    torch.nn.init.ones_(critic.head.weight)
    batch = Batch.collate(ROWS)

    def never():
        raise AssertionError("a critic with a trunk of its own does not read the policy's states")

    critic(batch, never).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.trunk.parameters())


def test_shared_trunk_has_a_head_alone_and_reaches_the_policy(tiny):
    policy, _ = load_policy(tiny)
    critic = Critic(policy, own_trunk=False)
    assert sum(p.numel() for p in critic.parameters()) == 33
    torch.nn.init.ones_(critic.head.weight)
    batch = Batch.collate(ROWS)
    critic(batch, lambda: completion_states(policy.base_model, batch)).sum().backward()
    assert policy.base_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_logprobs_of_given_states_are_the_same(tiny):
    policy, _ = load_policy(tiny)
    batch = Batch.collate(ROWS)
    found = logprobs_of_states(policy, completion_states(policy.base_model, batch), batch, temperature=1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(found, completion_logprobs(policy, batch, temperature=1.0), strict=True)
    )
