"""GRPO: advantages by configuration, the KL term, dynamic sampling, and what a step reports."""

from __future__ import annotations

import pytest
import torch

from helpers import FunctionScorer, group, random_groups, rollouts, sampled, scored
from tether.algorithms import grpo, ppo
from tether.algorithms.experience import GroupExperience
from tether.algorithms.optimise import Optim
from tether.algorithms.policy_update import accumulate_minibatch
from tether.algorithms.rollouts import batch_of, policy_logprobs, rollout_figures
from tether.algorithms.surrogate import Surrogate
from tether.errors import ConfigError
from tether.figures import reduce
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.ops.advantages import centred, leave_one_out
from tether.types import Prompt, Sampling
from tether.world import ALONE

SAMPLING = Sampling(max_new_tokens=8)
PROMPTS = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(6)]


def letters(_, completion):
    return sum(i < 130 for i in completion.ids) / len(completion.ids)


def setting(tiny, **options):
    model, tokenizer = load_policy(tiny)
    config = grpo.Config(group_size=4, sampling=SAMPLING, optim=Optim(learning_rate=1e-2), **options)
    state = grpo.State.create(
        model, config, reference=reference_of(model), prompts=len(PROMPTS), total_steps=12, seed=0
    )
    return state, Engine(model, tokenizer), config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "advantage_scale": "batch",
            "loss_reduction": "token_mean",
            "surrogate": Surrogate(clip_high=0.28),
            "epochs_per_step": 2,
        },
        {"advantage_scale": "none", "loss_reduction": "fixed_length", "minibatches": 3},
        {"advantage_scale": "none", "advantage_baseline": "leave_one_out"},
        {"ratio_level": "sequence", "kl_level": "token", "kl_estimator": "k3"},
    ],
    ids=["grpo", "dapo", "dr-grpo", "rloo", "gspo"],
)
def test_a_few_steps_raise_the_reward_in_every_variant(tiny, options):
    state, engine, config = setting(tiny, kl_coef=0.001, **options)
    rows = [
        grpo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(letters), config=config).metrics
        for _ in range(12)
    ]
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert abs(rows[0]["kl"]) < 1e-3
    assert rows[0]["sampling/logprob_gap_max"] < 1e-4
    assert {"clip_ratio/region_mean", "frac_reward_zero_std", "entropy", "loss", "loss/kl"} <= rows[0].keys()


def test_advantages_by_configuration():
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])

    def found(**options):
        config = grpo.Config(kl_coef=0.0, group_size=3, **options)
        return grpo.advantages_of(scores, torch.zeros(6, 2), config, ALONE)[0]

    torch.testing.assert_close(found(advantage_scale="none"), centred(scores))
    torch.testing.assert_close(found(advantage_scale="none", advantage_baseline="leave_one_out"), leave_one_out(scores))
    # group scaling makes both groups' spreads 1, batch scaling leaves the second one's larger
    by_group, by_batch = found().std(1), found(advantage_scale="batch").std(1)
    torch.testing.assert_close(by_group, torch.ones(2), atol=1e-3, rtol=0)
    assert by_batch[1] / by_batch[0] == pytest.approx(27**0.5, rel=1e-3)  # Bessel stds 1 and sqrt(27)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
def test_with_its_baseline_the_kl_pull_of_a_group_is_zero_on_average(baseline, estimator):
    """The weight of grad log pi is -(c(d_i) - baseline_i), which sums to zero over a group, as the rewards' does."""
    config = grpo.Config(kl_coef=1.0, kl_estimator=estimator, advantage_baseline=baseline, advantage_scale="none")
    log_ratio = torch.randn(6, 5)
    slope = grpo.kl_slope(estimator, log_ratio.sum(1)).view(2, 3)
    weight = slope - grpo.advantages_of(torch.zeros(2, 3), log_ratio, config, ALONE)[0]
    torch.testing.assert_close(weight.sum(1), torch.zeros(2), atol=1e-4, rtol=0)
    if estimator != "k1":
        assert weight.abs().max() > 0.1


def test_equal_rewards_move_nothing_when_there_is_no_kl(tiny):
    state, engine, config = setting(tiny, kl_coef=0.0)
    before = [p.detach().clone() for p in state.policy.parameters()]
    metrics = grpo.step(state, PROMPTS, generator=engine, scorer=FunctionScorer(lambda *_: 0.3), config=config).metrics
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters(), strict=True))


def test_dynamic_sampling_replaces_groups_without_variance(tiny):
    """Odd prompts always score 0; with dynamic_sampling the step is made of even ones, in numbers as asked."""
    state, engine, config = setting(tiny, dynamic_sampling=20)

    def score(prompt, completion):
        return letters(prompt, completion) if int(prompt.text) % 2 == 0 else 0.0

    cursor = state.cursor
    result = grpo.step(
        state,
        cursor.take(PROMPTS, 4),
        generator=engine,
        scorer=FunctionScorer(score),
        config=config,
        fresh=lambda n: cursor.take(PROMPTS, n),
    )
    assert len(result.groups) == 4
    assert {int(g.rollouts.prompt.text) % 2 for g in result.groups} == {0}
    assert result.metrics["frac_reward_zero_std"] == 0
    assert result.metrics["sampling/groups_drawn"] > 4
    assert 0 < result.metrics["sampling/frac_zero_std_drawn"] < 1


def test_dynamic_sampling_that_runs_out_leaves_the_step_its_size(tiny):
    state, engine, config = setting(tiny, dynamic_sampling=2)
    result = grpo.step(
        state,
        PROMPTS[:3],
        generator=engine,
        scorer=FunctionScorer(lambda *_: 1.0),
        config=config,
        fresh=lambda n: PROMPTS[:n],
    )
    assert len(result.groups) == 3
    assert result.metrics["sampling/groups_drawn"] == 9
    assert result.metrics["frac_reward_zero_std"] == 1


def test_on_policy_the_sequence_ratio_has_the_gradient_of_the_token_ratio(tiny):
    """Under a sequence mean and on-policy, both are A times the mean of grad log pi over the tokens."""
    model, _ = load_policy(tiny)
    groups = random_groups(2, 3)
    batch = batch_of(groups, torch.device("cpu"))
    logp = policy_logprobs(model, batch, temperature=1.0, token_budget=1000)
    experience = GroupExperience(sampled=sampled(batch, logp), advantages=torch.randn(6), kl_weight=torch.zeros(6))
    state = grpo.State.create(model, grpo.Config(), reference=reference_of(model), prompts=1, total_steps=1, seed=0)
    found = []
    for level in ("token", "sequence"):
        model.zero_grad()
        config = grpo.Config(ratio_level=level, kl_coef=0.0)
        accumulate_minibatch(
            state,
            experience,
            lambda part, config=config: grpo.objective(model, part, config),
            grpo.plan_of(config),
            world=ALONE,
        )
        found.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_rollout_figures_by_hand():
    one = scored(group((0, 4), [(5, 6, 1), (7, 8)]), [1.0, 3.0])
    two = scored(group((0,), [(9, 1), (1,)]), [2.0, 2.0])
    found = reduce(rollout_figures([one, two]), ALONE)
    assert found["reward"] == 2
    assert found["reward_std"] == pytest.approx(0.5**0.5)
    assert found["frac_reward_zero_std"] == 0.5
    assert found["completions/mean_length"] == 2
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/mean_terminated_length"] == 2
    assert found["num_tokens"] == 8 + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"advantage_baseline": "leave_one_out"}, "leave_one_out"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        grpo.Config(**options)


def test_the_price_of_the_kl_in_both_units(tiny):
    """Two groups with Bessel std 1 and 3, one with none: in units of the reward each pays kl_coef per nat."""
    model, _ = load_policy(tiny)
    totals = [[1.0, 2.0, 3.0], [0.0, 3.0, 6.0], [4.0, 4.0, 4.0]]
    groups = [scored(group((0, 5 + i), [(7, 1), (8, 1), (9, 1)]), row) for i, row in enumerate(totals)]

    def collected(**options):
        config = grpo.Config(group_size=3, kl_coef=0.2, **options)
        state = grpo.State.create(model, config, reference=reference_of(model), prompts=3, total_steps=1, seed=0)
        update = grpo.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE)
        return update.experience.kl_weight.view(3, 3)[:, 0].tolist(), update.metrics["kl_coef/effective"]

    weights, price = collected()
    assert weights == pytest.approx([0.2, 0.2 / 3, 0.2 / 5**0.5], rel=1e-3)
    assert price == pytest.approx(0.2)
    weights, price = collected(kl_units="advantage")
    assert weights == pytest.approx([0.2] * 3)
    assert price == pytest.approx(0.2 * (1 + 3 + 5**0.5) / 3, rel=1e-3)
    assert collected(advantage_scale="none")[0] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k_tokens": 4}, {"min_p": 0.05}])
@pytest.mark.parametrize("algorithm", [grpo, ppo], ids=["grpo", "ppo"])
def test_training_on_a_truncated_distribution_is_refused_unless_it_is_allowed(algorithm, options):
    with pytest.raises(ConfigError, match=r"never come back; leave them out, or give --allow-truncated-sampling"):
        algorithm.Config(sampling=Sampling(**options))
    algorithm.Config(sampling=Sampling(**options), allow_truncated_sampling=True)
    algorithm.Config(sampling=Sampling(min_new_tokens=3))
