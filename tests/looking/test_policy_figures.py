"""The figures of policies: by hand, beside each other, and where rewards do not apply."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from evaluated import groups_of
from helpers import completion
from tether.errors import ConfigError, RewardError
from tether.looking.policy_figures import Attempts, Sampled, against, best_of, by_prompt, comparisons, measured, pairs
from tether.types import RolloutGroup, ScoredGroup

OWN = {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0, 0.0], "c": [0.0, 0.0, 0.0, 0.0]}


def figures(scores, *, attempts=None, curve=True, reference=None, kl=None):
    one = Sampled(name="own", groups=groups_of(scores), kl=kl)
    other = None if reference is None else groups_of(reference)
    return measured(one, other, attempts=attempts or Attempts(), curve=curve, seed=0)


def said(prompt: str, texts, totals) -> ScoredGroup:
    """A group of these texts, each as many tokens long as it has words."""
    (made,) = groups_of({prompt: totals})
    rows = tuple(completion([7] * len(text.split()), text=text) for text in texts)
    return replace(made, rollouts=RolloutGroup(prompt=made.rollouts.prompt, completions=rows))


def test_pass_at_k_by_hand():
    """Of four completions 1, 2 and none pass: at k = 2, 1 - 3/6, 1 - 1/6 and 0."""
    found = figures(OWN, attempts=Attempts(pass_at=(1, 2, 4)))
    assert [one.k for one in found.pass_at] == [1, 2, 4]
    expected = [(1 / 4 + 1 / 2) / 3, (1 / 2 + 5 / 6) / 3, 2 / 3]
    assert [one.share.value for one in found.pass_at] == pytest.approx(expected)
    assert all(one.share.low >= 0 and one.share.high <= 1 for one in found.pass_at)


def test_what_passes_is_above_the_threshold():
    scores = {"a": [0.5, 0.2], "b": [-1.0, 0.6]}
    half = figures(scores, attempts=Attempts(pass_at=(1,), pass_above=0.5))
    assert half.pass_at[0].share.value == 0.25
    assert figures(scores, attempts=Attempts(pass_at=(1,))).pass_at[0].share.value == 0.75


def test_majority_votes_by_final_answer_however_it_is_written():
    groups = [
        said("a", ["so 4", "it is 4.0", "thus 5", "6"], [1.0, 1.0, 0.0, 0.0]),
        said("b", ["1", "2", "2", "9"], [1.0, 0.0, 0.0, 0.0]),
    ]
    one = Sampled(name="own", groups=groups, kl=None)
    found = measured(one, None, attempts=Attempts(majority_at=(1, 4), pass_at=(1,)), curve=False, seed=0)
    assert [share.share.value for share in found.majority_at] == pytest.approx([(0.5 + 0.25) / 2, 0.5])
    assert found.majority_at[0] == found.pass_at[0]


def test_the_best_of_n_by_hand_and_what_it_costs():
    """Totals 3, 1, 2 of one prompt: the best of two is 3 in two of three pairs; another part follows the choice."""
    rows = {"p": [3.0, 1.0, 2.0]}
    groups = groups_of(rows, judge={"p": [0.0, 9.0, 6.0]})
    found = best_of(groups, 2)
    assert found.reward.value == pytest.approx((3 + 3 + 2) / 3)
    assert found.rewards == {"fn": pytest.approx(8 / 3), "judge": pytest.approx(2.0)}
    assert found.kl_bound == pytest.approx(math.log(2) - 0.5)
    curve = figures({"p": [3.0, 1.0, 2.0], "q": [0.0, 0.0, 0.0]}).best_of_n
    assert [best.n for best in curve] == [1, 2, 3]
    assert curve[0].reward.value == pytest.approx(1.0)
    assert curve[2].reward.value == pytest.approx(1.5)
    assert figures(OWN, curve=False).best_of_n == ()
    assert figures({"p": [1.0]}).best_of_n == ()


def test_completions_without_a_reward_are_no_attempts():
    scores = {"a": [1.0, None, 0.0, None], "b": [None, None, None, None], "c": [1.0, 0.0, 0.0, 0.0]}
    found = figures(scores, attempts=Attempts(pass_at=(1, 2, 4)))
    assert [one.share.value for one in found.pass_at] == pytest.approx([(1 / 2 + 1 / 4) / 2, (1 + 1 / 2) / 2, 1.0])
    assert [one.share.prompts for one in found.pass_at] == [2, 2, 1]
    assert found.figures["completions_without_reward"] == 6
    assert [(best.n, best.reward.prompts) for best in found.best_of_n] == [(1, 2), (2, 2), (4, 1)]
    with pytest.raises(ConfigError, match="no prompt has 3 completions that a reward applies to"):
        figures({"a": [1.0, None, 0.0]}, attempts=Attempts(pass_at=(3,)))


def test_beside_another_policy_by_hand():
    own = [said("a", ["x y z", "x"], [2.0, 0.0]), said("b", ["x", "x y"], [1.0, 1.0])]
    rival = [said("a", ["x", "x"], [1.0, 1.0]), said("b", ["x", "x"], [1.0, 0.0])]
    found = comparisons(own, rival)
    assert found.wins.tolist() == [1, 0, 0.5, 1]
    assert found.longer_by.tolist() == [2, 0, 0, 1]
    assert found.weight.tolist() == [0.5] * 4
    assert found.prompt.tolist() == [0, 0, 1, 1]
    beside = against(own, rival, seed=0)
    assert beside.difference.value == pytest.approx((0 + 0.5) / 2)
    assert beside.win_rate.value == beside.wilson.value == pytest.approx((0.5 + 0.75) / 2)
    assert beside.win_rate.low <= 0.5 <= 0.75 <= beside.win_rate.high
    assert beside.longer_by == pytest.approx((2 + 0 + 0 + 1) / 4)
    assert beside.equal_length.value < beside.win_rate.value  # both wins were longer
    back = against(rival, own, seed=0)
    assert back.difference.value == -beside.difference.value
    assert back.equal_length.value == pytest.approx(1 - beside.equal_length.value)


def test_a_prompt_weighs_the_same_however_many_of_its_completions_are_compared():
    own, rival = (
        groups_of({"a": [1.0, 1.0, 1.0, 1.0], "b": [0.0, None, None, None]}),
        groups_of({"a": [0.0] * 4, "b": [1.0] * 4}),
    )
    found = against(own, rival, seed=0)
    assert comparisons(own, rival).weight.tolist() == [0.25] * 4 + [1.0]
    assert found.win_rate.value == found.equal_length.value == 0.5


def test_intervals_are_paired():
    """Prompts differ far more than the two policies do: the difference is told apart, the means are not."""
    levels = (torch.randn(40, generator=torch.Generator().manual_seed(0)) * 10).tolist()
    own = {f"p{i}": [level + 1.0 + i % 3] for i, level in enumerate(levels)}
    rival = {f"p{i}": [level] for i, level in enumerate(levels)}
    found = figures(own, reference=rival, kl=torch.ones(40))
    beside = found.against_reference
    assert beside.difference.low > 0
    assert beside.more_completions == 0
    assert found.reward.low < sum(levels) / 40 < found.reward.value
    assert found.kl.value == 1.0
    assert figures(rival, reference=rival).against_reference.equal_length.value == 0.5


def test_more_completions_count_all_of_a_prompt():
    own = {f"p{i}": [0.3 + (-1.0) ** i, 0.3] for i in range(20)}
    found = against(groups_of(own), groups_of({name: [0.0, 0.0] for name in own}), seed=0)
    assert found.difference.low > 0
    weak = {f"p{i}": [0.1 + (-1.0) ** i, 0.1] for i in range(20)}
    more = against(groups_of(weak), groups_of({name: [0.0, 0.0] for name in weak}), seed=0).more_completions
    assert more > 0
    assert more % 2 == 0


def test_pairs_are_ordered_and_hold_together():
    models = [
        Sampled(name=str(level), groups=groups_of({f"p{i}": [level + i % 2] for i in range(9)}), kl=None)
        for level in (1.0, 3.0, 2.0)
    ]
    found = pairs(models, seed=0)
    assert [(pair.a, pair.b) for pair in found] == [("3.0", "1.0"), ("2.0", "1.0"), ("3.0", "2.0")]
    assert all(pair.found.difference.value > 0 for pair in found)
    noisy = [
        Sampled(name=str(j), groups=groups_of({f"p{i}": [float((i * 7 + j * 3) % 5)] for i in range(30)}), kl=None)
        for j in range(3)
    ]
    three, two = pairs(noisy, seed=0)[0].found, pairs(noisy[:2], seed=0)[0].found
    assert three.difference.half_width > two.difference.half_width
    assert pairs(noisy[:1], seed=0) == ()


def test_rewards_and_kl_have_intervals_over_prompts():
    groups = groups_of(OWN, judge={name: [float(i) for i in range(4)] for name in OWN})
    kl = torch.arange(12, dtype=torch.float32)
    assert by_prompt(groups, kl.tolist()) == [1.5, 5.5, 9.5]
    found = measured(Sampled(name="o", groups=groups, kl=kl), groups, attempts=Attempts(), curve=True, seed=0)
    assert found.rewards.keys() == {"fn", "judge"}
    assert found.rewards["judge"].half_width == 0
    assert found.reward.half_width == pytest.approx(found.figures["reward_ci95"])
    assert found.kl.half_width == pytest.approx(4.302653 * 4 / math.sqrt(3), rel=1e-5)
    assert found.figures["kl"] == found.kl.value == 5.5


def test_nothing_to_compare_is_an_error():
    one, other = groups_of({"a": [1.0, None]}), groups_of({"a": [None, 1.0]})
    with pytest.raises(RewardError, match="no reward applies to both completions"):
        against(one, other, seed=0)
    with pytest.raises(RewardError, match="no reward applies"):
        figures({"a": [None, None]})


def test_one_prompt_has_no_interval():
    found = figures({"a": [1.0, 0.0]}, reference={"a": [0.0, 0.0]}, attempts=Attempts(pass_at=(2,)))
    assert found.against_reference.win_rate.low == -math.inf
    assert (found.pass_at[0].share.low, found.pass_at[0].share.high) == (0.0, 1.0)
