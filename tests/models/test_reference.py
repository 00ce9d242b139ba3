"""The reference, and what is trained of a model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from helpers import FunctionScorer
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.config import EvaluationOptions
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.policy import policy_logits, replace_weights
from tether.models.reference import reference_of
from tether.models.trainable import trainable
from tether.training.held_out import HeldOut
from tether.types import Prompt, Sampling

IDS = torch.tensor([[0, 70, 71]])


def test_the_reference_stays_where_the_policy_was(tiny):
    policy, _ = load_policy(tiny)
    before = policy_logits(policy, IDS).detach()
    reference = reference_of(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1)
    with reference.model() as model:
        assert torch.equal(policy_logits(model, IDS), before)
        assert trainable(model) == {}
    assert not torch.allclose(policy_logits(policy, IDS), before)


def test_what_is_trained_is_what_requires_a_gradient_and_tied_weights_count_once(tiny):
    policy, _ = load_policy(tiny)  # its output projection is tied to its embedding
    assert trainable(policy).keys() == dict(policy.named_parameters()).keys()
    assert "lm_head.weight" not in trainable(policy)
    policy.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in trainable(policy)
    assert all(weight.requires_grad for weight in trainable(policy).values())


def test_the_trainable_part_is_enough_to_bring_a_like_model_up_to_date(tiny):
    (policy, _), (other, _) = load_policy(tiny), load_policy(tiny)
    for model in (policy, other):
        model.model.embed_tokens.requires_grad_(False)
    with torch.no_grad():
        for weight in trainable(policy).values():
            weight.mul_(1.5)
    replace_weights(other, trainable(policy).items())
    assert torch.equal(policy_logits(policy, IDS), policy_logits(other, IDS))


def test_weights_that_do_not_fit_change_nothing(tiny):
    policy, _ = load_policy(tiny)
    before = policy_logits(policy, IDS).detach()
    moved = {name: weight.detach() + 1 for name, weight in trainable(policy).items()}
    first = next(iter(moved))
    for wrong in (
        {name: weight for name, weight in moved.items() if name != first},
        {**moved, "unknown": torch.ones(1)},
        {**moved, first: torch.ones(3)},
    ):
        with pytest.raises(ValueError, match="do not fit"):
            replace_weights(policy, wrong.items())
    assert torch.equal(policy_logits(policy, IDS), before)


class Swapped:
    """A reference that is the policy's own module with other weights inside the block, as adapters that are off are."""

    def __init__(self, policy):
        self.policy = policy
        self.before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}

    @contextmanager
    def model(self):
        now = {name: weight.detach().clone() for name, weight in self.policy.named_parameters()}
        replace_weights(self.policy, self.before.items())
        yield self.policy
        replace_weights(self.policy, now.items())


@pytest.mark.parametrize("algorithm", [grpo, ppo], ids=["grpo", "ppo"])
def test_a_reference_may_share_the_policys_module(tiny, algorithm):
    """Steps, KL and a comparison on held-out prompts are those with a frozen copy, bit by bit."""
    found = []
    for make in (reference_of, Swapped):
        policy, tokenizer = load_policy(tiny)
        config = algorithm.Config(group_size=2, sampling=Sampling(max_new_tokens=4), optim=Optim(learning_rate=1e-2))
        state = algorithm.State.create(policy, config, reference=make(policy), prompts=2, total_steps=2, seed=0)
        engine, scorer = Engine(policy, tokenizer), FunctionScorer(lambda _, completion: completion.ids[0])
        prompts = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(2)]
        rows = [
            algorithm.step(state, prompts, generator=engine, scorer=scorer, config=config).metrics for _ in range(2)
        ]
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "sampling/"))} for row in rows]
        held_out = HeldOut(
            policy=policy,
            reference=state.reference,
            engine=engine,
            prompts=prompts,
            score=scorer,
            judges=(),
            sampling=config.sampling,
            options=EvaluationOptions(),
            seed=1,
            journal=None,
        )
        found.append((rows, held_out.metrics_after(2)))
    assert found[0] == found[1]
    assert found[0][1]["eval/kl"] > 0
