"""Figures that reduce, and a step that is shared by ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from enumerable import tiny_llama
from helpers import FunctionScorer, gradient, random_groups, relative_error
from ranks import on_ranks
from tether.algorithms import grpo, ppo, reward_model, sft
from tether.algorithms.optimise import Optim
from tether.algorithms.rollouts import first_of, rollout_figures
from tether.algorithms.surrogate import Surrogate
from tether.figures import Max, Mean, Min, Std, Sum, reduce
from tether.models.memory import within_memory
from tether.models.reference import reference_of
from tether.ops.masked import whiten
from tether.types import Demonstration, Prompt, Sampling, make_requests
from tether.world import ALONE


def test_alone_everything_is_itself():
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor
    assert (ALONE.sum(3), ALONE.max(4.0), ALONE.any(True), ALONE.any(False)) == (3, 4.0, True, False)
    assert ALONE.gather("x") == ["x"]
    assert (ALONE.rank, ALONE.size) == (0, 1)


def test_figures_reduce_by_hand():
    """Rank 0 holds 1, 3 and rank 1 holds 5: mean 3, standard deviation sqrt(8 / 3)."""
    parts = [
        {"mean": Mean(2.0, 2), "std": Std(1.0, 2.0, 2), "sum": Sum(4.0), "max": Max(3.0), "min": Min(1.0)},
        {"mean": Mean(5.0, 1), "std": Std(0.0, 5.0, 1), "sum": Sum(5.0), "max": Max(5.0), "min": Min(5.0)},
    ]
    parts[1]["only/here"] = Mean(7.0, 3)
    for metrics in on_ranks(2, lambda world: reduce(parts[world.rank], world)):
        assert metrics == pytest.approx(
            {"mean": 3.0, "std": math.sqrt(8 / 3), "sum": 9.0, "max": 5.0, "min": 1.0, "only/here": 7.0}
        )


def test_a_mean_over_nothing_weighs_nothing():
    parts = [{"x": Mean(0.0, 0)}, {"x": Mean(4.0, 2)}]
    assert on_ranks(2, lambda world: reduce(parts[world.rank], world)["x"]) == [4.0, 4.0]
    assert on_ranks(2, lambda world: reduce({"x": Mean(0.0, 0)}, world)["x"]) == [0.0, 0.0]


def test_rollout_figures_of_parts_are_those_of_the_whole():
    groups = random_groups(6, 3)
    shares = [groups[:2], groups[2:]]
    expected = reduce(rollout_figures(groups), ALONE)
    for found in on_ranks(2, lambda world: reduce(rollout_figures(shares[world.rank]), world)):
        assert found == pytest.approx(expected, rel=1e-5)


def test_whitening_is_over_all_ranks():
    x, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.3
    expected = whiten(x, mask)
    rows = [slice(0, 2), slice(2, 6)]
    found = on_ranks(2, lambda w: whiten(x[rows[w.rank]], mask[rows[w.rank]], across=w.sum))
    torch.testing.assert_close(torch.cat(found), expected)


def test_memory_that_is_short_on_one_rank_halves_the_budget_of_all():
    def attempt(rank, budget):
        if rank == 1 and budget > 25:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return budget

    found = on_ranks(2, lambda w: within_memory(lambda budget: attempt(w.rank, budget), 100, agree=w.any))
    assert found == [(25, 25), (25, 25)]


class Replay:
    """A Generator that gives the rollouts it was made with, by prompt."""

    def __init__(self, groups):
        self.groups = {group.rollouts.prompt.text: group.rollouts for group in groups}

    def generate(self, requests, *, sampling):
        return [self.groups[request.prompt.text] for request in requests]

    def load_weights(self, version, weights):
        dict(weights)

    def figures(self):
        return {}


def rollouts(prompts, group_size):
    """Rollout groups over eight tokens whose prompts can be told apart by their text."""
    found = random_groups(prompts, group_size, vocab=7, longest=4, seed=3)
    return [
        type(g)(
            rollouts=type(g.rollouts)(
                prompt=Prompt(ids=g.rollouts.prompt.ids, text=str(i)), completions=g.rollouts.completions
            ),
            scores=g.scores,
        )
        for i, g in enumerate(found)
    ]


SAMPLING = Sampling(max_new_tokens=4)
OPTIONS = {"sampling": SAMPLING, "optim": Optim(learning_rate=1e-3)}
ALGORITHMS = {
    "ppo": (ppo, {"whiten_rewards": True, "adaptive_kl_target": 0.5, "adaptive_kl_horizon": 20, "entropy_coef": 0.01}),
    "ppo-target_kl": (ppo, {"epochs_per_step": 4, "target_kl": 1e-3}),
    "grpo": (grpo, {"group_size": 3}),
    "grpo-batch": (grpo, {"group_size": 3, "advantage_scale": "batch", "loss_reduction": "token_mean"}),
    "grpo-reinforce++": (
        grpo,
        {
            "advantage_baseline": "batch",
            "advantage_scale": "batch",
            "entropy_target": 9.0,
            "epochs_per_step": 2,
            "surrogate": Surrogate(policy_loss="sapo", mismatch="tis"),
        },
    ),
}


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_a_policy_step_on_two_ranks_is_the_step_of_one(algorithm, options):
    """Unequal shares of the prompts: weights and every metric agree, and all ranks end with the same weights."""
    groups = rollouts(6, 3)
    scores = {
        (group.rollouts.prompt.text, completion.ids): score
        for group in groups
        for completion, score in zip(group.rollouts.completions, group.scores, strict=True)
    }
    config = algorithm.Config(**{"group_size": 3, **OPTIONS, **options})

    base = tiny_llama(8)

    def run(share, world):
        policy = copy.deepcopy(base)
        state = algorithm.State.create(policy, config, reference=reference_of(policy), prompts=1, total_steps=3, seed=0)
        scorer = FunctionScorer(lambda prompt, completion: scores[prompt.text, completion.ids].total)
        prompts = [group.rollouts.prompt for group in share]
        rows = [
            algorithm.step(state, prompts, generator=Replay(share), scorer=scorer, config=config, world=world).metrics
            for _ in range(2)
        ]
        return torch.cat([p.detach().flatten() for p in policy.parameters()]), rows

    expected, rows = run(groups, ALONE)
    shares = [groups[:2], groups[2:]]
    (one, rows_one), (two, rows_two) = on_ranks(2, lambda world: run(shares[world.rank], world))
    assert torch.equal(one, two)
    start = torch.cat([p.detach().flatten() for p in base.parameters()])
    assert relative_error(one - start, expected - start) < 2e-2  # Adam divides by gradients that may be next to nothing
    for row, row_one, row_two in zip(rows, rows_one, rows_two, strict=True):
        whole, first, second = (
            {name: value for name, value in one.items() if not name.startswith("time/")}
            for one in (row, row_one, row_two)
        )
        assert first == second
        assert first == pytest.approx(whole, rel=2e-3, abs=2e-5)


def test_the_gradient_of_fine_tuning_does_not_change_with_ranks():
    data = [Demonstration(prompt_ids=(0, 3), completion_ids=(4, 5, 6, 1)[: 1 + i % 4]) for i in range(7)]
    base = tiny_llama(8)

    def run(rows, world):
        policy = copy.deepcopy(base)
        state = sft.State.create(policy, len(data), sft.Config(optim=Optim(learning_rate=1e-3)), seed=0)
        kept = []
        state.optimizer.register_step_pre_hook(lambda *_: kept.append(gradient(policy).clone()))
        metrics = sft.step(state, rows, config=sft.Config(optim=Optim(max_grad_norm=1e9)), world=world).metrics
        return kept[0], metrics["loss"]

    expected, loss = run(data, ALONE)
    for found, found_loss in on_ranks(2, lambda world: run([data[:2], data[2:]][world.rank], world)):
        assert relative_error(found, expected) < 1e-5
        assert found_loss == pytest.approx(loss, rel=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all():
    data = [Demonstration(prompt_ids=(0, 3), completion_ids=(4, 1))]

    base = tiny_llama(8)

    def run(world):
        policy = copy.deepcopy(base)
        state = sft.State.create(policy, 1, sft.Config(), seed=0)
        state.guard.taken = 1
        if world.rank == 1:
            torch.nn.init.constant_(policy.lm_head.weight, math.nan)
        metrics = sft.step(state, data, config=sft.Config(), world=world).metrics
        return state.guard.skipped, "loss" in metrics

    assert on_ranks(2, run) == [(1, False), (1, False)]


def test_reward_figures_are_those_of_all_ranks():
    chosen, rejected = torch.randn(2, 9)
    expected = reduce(reward_model.score_figures(chosen, rejected), ALONE)
    cut = [slice(0, 4), slice(4, 9)]
    found = on_ranks(2, lambda w: reduce(reward_model.score_figures(chosen[cut[w.rank]], rejected[cut[w.rank]]), w))
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-5)


def test_no_two_completions_of_a_step_share_a_seed_however_its_prompts_are_shared_out():
    prompts = [Prompt(ids=(0, i), text=str(i)) for i in range(7)]
    shares = [prompts[:4], prompts[4:]]

    def seeds(world):
        share = shares[world.rank]
        asked = make_requests(share, group_size=2, seed=5, first=first_of(share, world))
        return [seed for request in asked for seed in request.seeds]

    one, two = on_ranks(2, seeds)
    assert one + two == [seed for request in make_requests(prompts, group_size=2, seed=5) for seed in request.seeds]
