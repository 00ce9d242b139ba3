"""The gradient of a step does not depend on how the step is cut, padded or ordered."""

from __future__ import annotations

import pytest
import torch

from helpers import Frozen, gradient, random_groups, relative_error, sampled, step_gradient
from tether.algorithms import grpo, ppo, reward_model, sft
from tether.algorithms.experience import GroupExperience, TokenExperience
from tether.algorithms.optimise import Guard
from tether.algorithms.policy_update import accumulate_minibatch
from tether.algorithms.rollouts import batch_of
from tether.data.batching import Cursor, minibatches
from tether.models.loading import load_policy
from tether.models.reference import FrozenCopy, reference_of
from tether.models.reward import new_reward_model
from tether.types import Demonstration, PreferencePair, Sampling
from tether.world import ALONE

BUDGETS = [1, 30, 77, 10_000]
SAMPLING = Sampling(max_new_tokens=9)


def rows(n, seed=0):
    return [c.ids for g in random_groups(n, 1, seed=seed) for c in g.rollouts.completions]


@pytest.fixture(scope="module")
def policy(tiny):
    return load_policy(tiny)[0]


def same_gradients(gradients):
    first, *others = gradients
    assert first.norm() > 0
    for other in others:
        assert relative_error(other, first) < 1e-5


def test_sft(policy):
    data = [Demonstration(prompt_ids=(0, 5), completion_ids=ids) for ids in rows(7)]

    def run(order, budget):
        def step(optimizer):
            state = sft.State(
                policy=policy, optimizer=optimizer, cursor=Cursor(8, 0), guard=Guard(token_budget=budget), total_steps=1
            )
            config = sft.Config(optim=sft.Optim(max_grad_norm=1e9))
            sft.step(state, [data[i] for i in order], config=config)

        return step_gradient(policy, step)

    same_gradients([run(range(7), budget) for budget in BUDGETS] + [run([6, 2, 0, 4, 1, 5, 3], 40)])


def test_reward_model(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    pairs = [
        PreferencePair(prompt_ids=(0, 9), chosen_ids=a, rejected_ids=b, margin=0.1 * i)
        for i, (a, b) in enumerate(zip(rows(7), rows(7, seed=5), strict=True))
    ]

    def run(order, budget):
        def step(optimizer):
            state = reward_model.State(
                model=model, optimizer=optimizer, cursor=Cursor(8, 0), guard=Guard(token_budget=budget), total_steps=1
            )
            config = reward_model.Config(optim=sft.Optim(max_grad_norm=1e9))
            reward_model.step(state, [pairs[i] for i in order], config=config)

        return step_gradient(model, step)

    same_gradients([run(range(7), budget) for budget in BUDGETS] + [run([6, 2, 0, 4, 1, 5, 3], 40)])


def grpo_experience(groups, policy):
    batch = batch_of(groups, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    shape = batch.mask.shape
    return GroupExperience(
        sampled=sampled(
            batch, -2 + torch.randn(shape, generator=generator), -2 + torch.randn(shape, generator=generator)
        ),
        advantages=torch.randn(shape[0], generator=generator),
        kl_weight=torch.rand(shape[0], generator=generator),
    )


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize(("ratio_level", "kl_level"), [("token", "sequence"), ("sequence", "token")])
def test_grpo(policy, reduction, ratio_level, kl_level):
    experience = grpo_experience(random_groups(4, 3), policy)
    state = grpo.State(
        policy=policy,
        reference=FrozenCopy(policy),
        optimizer=Frozen(policy),
        cursor=None,
        entropy_coef=0.0,
        guard=Guard(token_budget=1),
        seed=0,
        total_steps=1,
    )

    def run(order, budget):
        policy.zero_grad()
        config = grpo.Config(
            loss_reduction=reduction,
            ratio_level=ratio_level,
            kl_level=kl_level,
            kl_estimator="k3_corrected",
            sampling=SAMPLING,
        )
        state.guard.token_budget = budget
        accumulate_minibatch(
            state,
            experience.rows(torch.tensor(order)),
            lambda part: grpo.objective(policy, part, config),
            grpo.plan_of(config),
            world=ALONE,
        )
        return gradient(policy).clone()

    whole = list(range(12))
    same_gradients([run(whole, budget) for budget in BUDGETS] + [run(whole[::-1], 50)])


@pytest.mark.parametrize("own_trunk", [True, False])
def test_ppo(policy, own_trunk):
    config = ppo.Config(critic_trunk=own_trunk, sampling=SAMPLING, entropy_coef=0.1)
    state = ppo.State.create(policy, config, reference=reference_of(policy), prompts=1, total_steps=1, seed=0)
    torch.nn.init.normal_(state.critic.head.weight)
    base = grpo_experience(random_groups(4, 3), policy)
    generator = torch.Generator().manual_seed(4)
    values, advantages, returns = (torch.randn(base.sampled.old_logp.shape, generator=generator) for _ in range(3))
    experience = TokenExperience(
        sampled=base.sampled,
        values=values,
        advantages=advantages,
        returns=returns,
    )

    def run(order, budget):
        policy.zero_grad()
        state.critic.zero_grad()
        state.guard.token_budget = budget
        accumulate_minibatch(
            state,
            experience.rows(torch.tensor(order)),
            lambda part: ppo.objective(state, part, config),
            ppo.plan_of(config),
            world=ALONE,
        )
        return torch.cat([gradient(policy), gradient(state.critic)]).clone()

    whole = list(range(12))
    same_gradients([run(whole, budget) for budget in BUDGETS] + [run(whole[::-1], 50)])


def test_minibatches_share_out_every_row_once():
    parts = minibatches(10, 3, seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert sorted(map(len, parts)) == [3, 3, 4]
