"""PPO: what a token earns, what a step does, and the general case of dense rewards and a discount."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from enumerable import tiny_llama
from helpers import FunctionScorer, group, random_groups, rollouts, scored
from tether.algorithms import ppo
from tether.algorithms.optimise import Optim
from tether.algorithms.policy_update import learn
from tether.algorithms.rollouts import policy_logprobs
from tether.errors import ConfigError, GuardError
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.types import Prompt, Sampling, Score, ScoredGroup, make_requests
from tether.world import ALONE
from tiny import byte_tokenizer

PROMPTS = [Prompt(ids=(0, 70, 71), text="ab"), Prompt(ids=(0, 80), text="k")]
SAMPLING = Sampling(max_new_tokens=8)


def test_token_rewards_worked_by_hand():
    """Row 0: three tokens with EOS and a score of 2. Row 1: two tokens, cut, with dense rewards and a penalty of 1."""
    eos = scored(group((0,), [(5, 6, 1)]), [2.0])
    cut = scored(group((0,), [(7, 8)]), [0.75], token_rewards=[(0.5, 0.25)])
    log_ratio = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, 0.0]])
    found = ppo.token_rewards([eos, cut], log_ratio, kl_coef=0.1, missing_eos_penalty=1.0)
    torch.testing.assert_close(found, torch.tensor([[-0.1, 0.2, 1.95], [0.1, -0.75, 0.0]]))


def state_and_engine(tiny, **options):
    model, tokenizer = load_policy(tiny)
    config = ppo.Config(group_size=4, sampling=SAMPLING, optim=Optim(learning_rate=1e-2), **options)
    return (
        ppo.State.create(model, config, reference=reference_of(model), prompts=2, total_steps=10, seed=0),
        Engine(model, tokenizer),
        config,
    )


def letters(_, completion):
    """Rewards the share of tokens in the first half of the alphabet of bytes."""
    return sum(i < 130 for i in completion.ids) / len(completion.ids)


@pytest.mark.parametrize("own_trunk", [True, False])
def test_a_few_steps_raise_the_reward_and_report_the_fields_metrics(tiny, own_trunk):
    state, engine, config = state_and_engine(tiny, kl_coef=0.01, critic_trunk=own_trunk, minibatches=2)
    results = [
        ppo.step(state, PROMPTS * 8, generator=engine, scorer=FunctionScorer(letters), config=config) for _ in range(10)
    ]
    rewards = [r.metrics["reward"] for r in results]
    assert rewards[-1] > rewards[0] + 0.15
    assert results[-1].metrics["kl"] > 0.1
    assert abs(results[0].metrics["kl"]) < 1e-3  # the reference is where the policy started
    assert results[0].metrics["sampling/logprob_gap_max"] < 1e-4
    assert results[0].metrics["val/mean"] == 0  # the head starts at zero
    assert state.step == 10
    assert engine.version == 10
    wanted = {
        "policy/approxkl", "policy/clipfrac", "loss/policy", "loss/value", "val/ratio", "entropy", "kl_coef",
        "reward_std", "completions/mean_length", "completions/clipped_ratio", "completions/mean_terminated_length",
        "num_tokens", "grad_norm", "learning_rate", "val/explained_variance", "objective/non_score_reward",
    }  # fmt: skip
    assert wanted <= results[0].metrics.keys()


def test_sampler_logprobs_are_the_policys_unless_sampling_is_truncated(tiny):
    model, tokenizer = load_policy(tiny)
    for options, same in (({"temperature": 0.7}, True), ({"temperature": 0.7, "top_p": 0.6}, False)):
        sampling = Sampling(max_new_tokens=8, **options)
        drawn = Engine(model, tokenizer).generate(make_requests(PROMPTS, group_size=4, seed=0), sampling=sampling)
        groups = FunctionScorer(letters).score(drawn)
        config = ppo.Config(sampling=sampling, allow_truncated_sampling=True)
        state = ppo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0)
        update = ppo.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE)
        found = update.experience.sampled
        trained = policy_logprobs(model, found.batch, temperature=0.7, token_budget=100)
        assert torch.allclose(found.sampler_logp, trained, atol=1e-4) is same
        torch.testing.assert_close(found.old_logp, trained, atol=1e-4, rtol=0)


def test_the_gap_to_the_sampler_is_not_made_up(tiny):
    """With a truncated distribution the old log-probs are the trainer's own, and a gap of 0 would say nothing."""
    state, engine, config = state_and_engine(tiny)
    config = replace(config, sampling=Sampling(max_new_tokens=4, top_k_tokens=5), allow_truncated_sampling=True)
    metrics = ppo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(letters), config=config).metrics
    assert not any(name.startswith("sampling/logprob_gap") for name in metrics)


def test_target_kl_ends_the_passes_of_a_step(tiny):
    state, engine, config = state_and_engine(tiny, epochs_per_step=8, target_kl=1e-4)
    result = ppo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(letters), config=config)
    assert 1 <= result.metrics["optimizer_steps"] < 8
    assert all(p.grad is None for p in state.policy.parameters())


def test_adaptive_kl_moves_the_coefficient_as_the_rule_says(tiny):
    state, engine, config = state_and_engine(tiny, kl_coef=0.15, adaptive_kl_target=6.0, adaptive_kl_horizon=100)
    before = ppo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(letters), config=config).metrics
    assert before["kl_coef"] == 0.15
    assert state.kl_coef == pytest.approx(0.15 * (1 - 0.2 * 8 / 100))  # KL is about 0: the error is bounded at -0.2


def test_policy_and_critic_are_clipped_apart(tiny):
    """A huge value loss does not shrink the policy's step."""
    groups = random_groups(2, 4)
    moved = []
    for scale in (1.0, 1e4):
        state, _, _ = state_and_engine(tiny)
        config = ppo.Config(
            group_size=4, sampling=SAMPLING, epochs_per_step=1, value_coef=scale, optim=Optim(learning_rate=1e-3)
        )
        update = ppo.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE)
        before = torch.cat([p.detach().flatten().clone() for p in state.policy.parameters()])
        objective = partial(ppo.objective, state, config=config)
        learn(state, update, objective, ppo.plan_of(config), where="test", world=ALONE)
        moved.append(torch.cat([p.detach().flatten() for p in state.policy.parameters()]) - before)
    torch.testing.assert_close(moved[0], moved[1])


def test_a_reward_that_is_not_finite_stops_the_run_before_any_weight_moves(tiny):
    state, engine, config = state_and_engine(tiny)
    before = [p.detach().clone() for p in state.policy.parameters()]
    with pytest.raises(GuardError, match="ppo step 1: the reward is not finite"):
        ppo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(lambda *_: float("inf")), config=config)
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_kl_target": 6.0, "kl_coef": 0.0}, "adaptive_kl_target needs an initial kl_coef"),
        ({"lam": 1.5}, "lam must"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ppo.Config(**options)


# A maze as text: the tokens 3, 4, 5, 6 move right, down, left, up on a 4 x 4 board with a wall, from one corner to the
# opposite one, and every step costs the distance that is left. Any other token stays where it is.

SIDE, GOAL, WALLS = 4, (3, 3), {(1, 1), (1, 2), (2, 1)}
MOVES = {3: (1, 0), 4: (0, 1), 5: (-1, 0), 6: (0, -1)}


def walk(ids):
    """Minus the distance to the goal after each token."""
    x, y = 0, 0
    rewards = []
    for token in ids:
        dx, dy = MOVES.get(token, (0, 0))
        there = (x + dx, y + dy)
        if all(0 <= c < SIDE for c in there) and there not in WALLS:
            x, y = there
        rewards.append(-float(abs(GOAL[0] - x) + abs(GOAL[1] - y)))
    return rewards


class Maze:
    """A Scorer that rewards every token."""

    def score(self, groups):
        return [
            ScoredGroup(
                rollouts=g,
                scores=tuple(
                    Score(total=sum(rewards), token_rewards=tuple(rewards))
                    for rewards in (walk(c.ids) for c in g.completions)
                ),
            )
            for g in groups
        ]


@pytest.mark.slow
def test_dense_rewards_and_a_discount_find_the_way_through_a_maze():
    model = tiny_llama(8)
    config = ppo.Config(
        group_size=64,
        kl_coef=0.0,
        gamma=0.9,
        lam=0.9,
        entropy_coef=0.02,  # there are dead ends one step closer to the goal than their way out
        sampling=Sampling(max_new_tokens=10, min_new_tokens=10),
        optim=Optim(learning_rate=1e-3),
    )
    steps = 100
    state = ppo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=steps, seed=0)
    engine = Engine(model, byte_tokenizer())
    for _ in range(steps):
        result = ppo.step(state, [Prompt(ids=(0,), text="")], generator=engine, scorer=Maze(), config=config)
    greedy = engine.generate(
        make_requests([Prompt(ids=(0,), text="")], group_size=1, seed=0),
        sampling=Sampling(max_new_tokens=10, min_new_tokens=10, temperature=0.0),
    )
    distances = walk(greedy[0].completions[0].ids)
    assert distances[5:] == [0.0] * 5, json.dumps(distances)  # there in six moves, the fewest, and it stays
    assert result.metrics["val/explained_variance"] > 0.5
