"""Completions to which no reward applies: no advantage, no part in a baseline, and never a zero."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from commandline import read_rows, tether, write_rows
from helpers import group, random_groups, rollouts, scored
from tether.algorithms import grpo, ppo, sft
from tether.algorithms import rejection_sampling as rs
from tether.algorithms.optimise import Optim
from tether.algorithms.rollouts import applies_of, require_rewards, rollout_figures, scores_of
from tether.errors import RewardError
from tether.evaluation import evaluate_policy
from tether.figures import reduce
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.monitor.flat_rewards import all_flat, compared
from tether.ops.advantages import (
    centred,
    group_std,
    leave_one_out,
    reward_spread,
    standardised,
    zero_variance,
)
from tether.types import Prompt, Sampling, Score, ScoredGroup, StepResult
from tether.world import ALONE

CPU = torch.device("cpu")


def without(groups, absent):
    """The groups, with no score where ``absent`` says so."""
    return [
        ScoredGroup(
            rollouts=one.rollouts,
            scores=tuple(Score(total=None) if gone else score for score, gone in zip(one.scores, which, strict=True)),
        )
        for one, which in zip(groups, absent, strict=True)
    ]


def left(groups):
    """The groups of scored completions alone, without those that have none."""
    kept = []
    for one in groups:
        rows = [(c, s) for c, s in zip(one.rollouts.completions, one.scores, strict=True) if s.total is not None]
        if rows:
            completions, scores = zip(*rows, strict=True)
            kept.append(ScoredGroup(rollouts=replace(one.rollouts, completions=completions), scores=scores))
    return kept


# -- advantages ------------------------------------------------------------------------------------------------------


REWARDS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
APPLIES = torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.6
APPLIES[7] = False


def by_group(rewards, applies=None):
    return standardised(rewards, applies, scale="group")[0]


def by_batch(rewards, applies=None):
    return standardised(rewards, applies, scale="batch")[0]


@pytest.mark.parametrize("advantage", [centred, leave_one_out, by_group])
def test_a_group_is_as_if_the_others_had_not_been_sampled(advantage):
    found = advantage(torch.where(APPLIES, REWARDS, torch.tensor(math.nan)), APPLIES)
    sizes = set()
    for row, applies, advantages in zip(REWARDS, APPLIES, found, strict=True):
        sizes.add(size := int(applies.sum()))
        assert (advantages[~applies] == 0).all()
        expected = advantage(row[applies].unsqueeze(0))[0] if size > 1 else torch.zeros(size)
        torch.testing.assert_close(advantages[applies], expected)
    assert sizes == {0, 1, 2, 3, 4, 5}


def test_so_is_the_batch():
    found = by_batch(torch.where(APPLIES, REWARDS, torch.tensor(math.nan)), APPLIES)
    differences = [row[a] - row[a].mean() for row, a in zip(REWARDS, APPLIES, strict=True) if a.any()]
    whole = torch.cat([d if len(d) > 1 else torch.zeros(1) for d in differences])
    torch.testing.assert_close(found[APPLIES], whole / (whole.std() + 1e-4))
    assert (found[~APPLIES] == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_divides_the_rewards_leaves_them_out(scale):
    found = reward_spread(torch.where(APPLIES, REWARDS, torch.tensor(math.nan)), scale, APPLIES)
    compared = APPLIES.sum(1) > 1
    stds = torch.tensor([float(r[a].std()) if a.sum() > 1 else math.nan for r, a in zip(REWARDS, APPLIES, strict=True)])
    if scale == "group":
        typical = stds[compared].square().mean().sqrt()
        torch.testing.assert_close(found, torch.where(compared, stds, typical) + 1e-4)
    elif scale == "none":
        assert (found == 1).all()
    else:
        assert found.unique().numel() == 1
    assert found.isfinite().all()


def test_a_mask_of_trues_is_no_mask():
    everywhere = torch.ones_like(APPLIES)
    for advantage in (centred, leave_one_out, by_group, by_batch, zero_variance, group_std):
        torch.testing.assert_close(advantage(REWARDS, everywhere), advantage(REWARDS))


@pytest.mark.parametrize("applies", [[[False, False]], [[True, False]]])
def test_nothing_to_compare_is_no_signal(applies):
    mask, rewards = torch.tensor(applies), torch.tensor([[7.0, math.nan]])
    for advantage in (centred, leave_one_out, by_group, by_batch):
        assert advantage(rewards, mask).tolist() == [[0.0, 0.0]]
    for scale in ("group", "batch", "none"):
        assert reward_spread(rewards, scale, mask).isfinite().all()
    assert zero_variance(rewards, mask).all()


# -- figures ---------------------------------------------------------------------------------------------------------


def test_metrics_are_over_completions_with_a_reward():
    groups = [
        scored(group((0, 4), [(5, 1), (6, 1), (7, 1)]), [1.0, None, 3.0]),
        scored(group((0, 8), [(9, 1), (10, 1), (11, 1)]), [None, 5.0, None]),
    ]
    metrics = reduce(rollout_figures(groups), ALONE)
    assert metrics["reward"] == 3.0
    assert metrics["reward_std"] == pytest.approx((8 / 3) ** 0.5)
    assert metrics["frac_reward_none"] == 0.5
    assert metrics["frac_reward_zero_std"] == 0.5
    assert "reward" not in reduce(rollout_figures(without(groups, [[True] * 3] * 2)), ALONE)
    assert reduce(rollout_figures(left(groups)[:1]), ALONE)["frac_reward_none"] == 0.0


def test_a_step_without_any_reward_is_an_error():
    groups = without(random_groups(2, 3), [[True] * 3] * 2)
    with pytest.raises(RewardError, match="no reward applies to any completion of the step: all gave None"):
        require_rewards(groups, where="grpo step 1", world=ALONE)
    require_rewards([*groups, *random_groups(1, 3)], where="grpo step 1", world=ALONE)


def test_flat_rewards_looks_at_those_that_can_be_compared():
    def flat(*totals):
        rows = [scored(group((0, 4), [(5, 1)] * len(t)), t) for t in totals]
        return all_flat(compared(StepResult(metrics={}, groups=tuple(rows))))

    assert flat([1.0, None, 1.0])
    assert not flat([1.0, None, 2.0])
    assert not flat([None, 1.0], [None, None])  # nothing to compare
    assert flat([None, 1.0], [2.0, 2.0])


# -- algorithms ------------------------------------------------------------------------------------------------------


ABSENT = [[False, True, False, False], [True, True, True, True], [False, True, True, True], [False] * 4]


def collected(module, tiny, groups, **options):
    model, _ = load_policy(tiny)
    config = module.Config(group_size=4, **options)
    state = module.State.create(model, config, reference=reference_of(model), prompts=4, total_steps=4, seed=0)
    return module.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_gives_them_the_kl_alone(tiny, scale):
    groups = random_groups(4, 4)
    options = {"advantage_scale": scale, "kl_units": "advantage"}
    found = collected(grpo, tiny, without(groups, ABSENT), kl_coef=0.0, **options).experience
    absent = torch.tensor(ABSENT)
    advantages = found.advantages.view(4, 4)
    assert (advantages[absent] == 0).all()
    assert (advantages[2] == 0).all()  # one reward compares with nothing
    assert (advantages[0][~absent[0]] != 0).all()
    with_kl = collected(grpo, tiny, without(groups, ABSENT), kl_coef=0.1, **options).experience
    assert (with_kl.advantages.view(4, 4)[1] != 0).all()  # the baseline of the KL term
    assert len(with_kl.sampled.batch) == 16


def test_ppo_leaves_them_out_of_the_update(tiny):
    groups = random_groups(4, 4)
    found = collected(ppo, tiny, without(groups, ABSENT), kl_coef=0.1, whiten_rewards=True)
    expected = collected(ppo, tiny, left(without(groups, ABSENT)), kl_coef=0.1, whiten_rewards=True)
    assert len(found.experience.sampled.batch) == 8
    for name in ("sampler_logp", "old_logp", "ref_logp"):
        torch.testing.assert_close(getattr(found.experience.sampled, name), getattr(expected.experience.sampled, name))
    for name in ("values", "advantages", "returns"):
        torch.testing.assert_close(getattr(found.experience, name), getattr(expected.experience, name))
    assert torch.equal(found.experience.sampled.batch.ids, expected.experience.sampled.batch.ids)
    assert found.kl == pytest.approx(collected(ppo, tiny, groups, kl_coef=0.1).kl)  # of all that was sampled


class Now:
    """A scorer that gives the first completion of every prompt a reward, and those in ``also``."""

    def __init__(self, also=()):
        self.also = also

    def score(self, groups):
        return [
            scored(
                g, [float(len(c.ids)) if j == 0 or (i, j) in self.also else None for j, c in enumerate(g.completions)]
            )
            for i, g in enumerate(groups)
        ]


def test_ppo_with_fewer_rows_than_minibatches(tiny):
    model, tokenizer = load_policy(tiny)
    config = ppo.Config(group_size=4, minibatches=4, epochs_per_step=2, sampling=Sampling(max_new_tokens=4))
    state = ppo.State.create(model, config, reference=reference_of(model), prompts=2, total_steps=4, seed=0)
    prompts = [Prompt(ids=(0, 70), text="a"), Prompt(ids=(0, 71), text="b")]
    result = ppo.step(state, prompts, generator=Engine(model, tokenizer), scorer=Now(), config=config)
    assert result.metrics["optimizer_steps"] == 4  # two epochs of two rows
    assert result.metrics["frac_reward_none"] == 0.75


def test_rejection_sampling_never_selects_them():
    groups = [
        scored(group((0, 4), [(5, 1), (6, 1), (7, 1)]), [-3.0, None, None]),
        scored(group((0, 8), [(9, 1), (10, 1), (11, 1)]), [None, None, None]),
        scored(group((0, 9), [(12, 1), (13, 1), (14, 1)]), [5.0, 7.0, None]),
    ]

    def kept(**options):
        return [one.completion.ids[0] for one in rs.select(groups, rs.Config(group_size=3, **options), seed=0)]

    assert kept(top_k=1) == [5, 13]
    assert kept(top_k=2) == [5, 13, 12]
    assert kept(top_k=1, keep="overall") == [13, 12]  # two prompts have a reward
    assert set(kept(top_k=2, select="random")) == {5, 12, 13}


def test_a_round_imitates_what_is_left(tiny):
    model, tokenizer = load_policy(tiny)
    tuning = sft.Config(epochs=2, batch_size=1, optim=Optim(learning_rate=1e-3))
    config = rs.Config(group_size=3, top_k=2, rounds=2, sampling=Sampling(max_new_tokens=4), sft=tuning)
    state = rs.State.create(model, config, reference=reference_of(model), prompts=3, seed=0)
    prompts = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(3)]
    steps = []
    every = Now(also=[(i, 2) for i in range(3)])
    rounds = [
        rs.step(state, prompts, generator=Engine(model, tokenizer), scorer=scorer, config=config, on_step=steps.append)
        for scorer in (every, Now(also=[(0, 1)]), every)
    ]
    assert [len(one.selected) for one in rounds] == [6, 4, 6]
    assert len(steps) == 2 * 6 + 2 * 4 + 2 * 6  # every selected completion twice
    assert ["kl/selection_bound" in one.metrics for one in rounds] == [True, False, False]


def test_an_evaluation_counts_them_and_leaves_them_out():
    a = [
        scored(group((0, 4), [(5, 1), (6, 7, 1)]), [1.0, None]),
        scored(group((0, 8), [(9, 1), (10, 1)]), [3.0, 6.0]),
        scored(group((0, 9), [(9, 1), (10, 1)]), [None, None]),
    ]
    b = [
        scored(group((0, 4), [(5, 1), (6, 1)]), [0.0, 9.0]),
        scored(group((0, 8), [(9, 1), (10, 1)]), [None, 6.0]),
        scored(group((0, 9), [(9, 1), (10, 1)]), [1.0, 1.0]),
    ]
    found = evaluate_policy(a, b, kl=0.0)
    assert (found.completions, found.completions_without_reward, found.prompts) == (6, 3, 3)
    assert found.reward == pytest.approx(10 / 3)
    assert found.reward_ci95 == pytest.approx(12.7062 * torch.tensor([1.0, 4.5]).std().item() / math.sqrt(2), rel=1e-4)
    assert found.win_rate == 0.75  # one win, one tie
    assert found.mean_length == pytest.approx(13 / 6)
    nothing = without(a, [[True] * 2] * 3)
    for policy, reference in ((nothing, nothing), (a, nothing), (nothing, a)):
        with pytest.raises(RewardError, match="no reward applies to any completion of the evaluation"):
            evaluate_policy(policy, reference, kl=0.0)


def test_scores_are_marked_not_made_up():
    groups = [scored(group((0, 4), [(5, 1), (6, 1)]), [1.0, None])]
    assert scores_of(groups, CPU).isnan().tolist() == [[False, True]]
    assert applies_of(groups, CPU).tolist() == [[True, False]]
    assert applies_of(random_groups(2, 3), CPU) is None


# -- runs ------------------------------------------------------------------------------------------------------------

MIXED = """
def right(completions, answer, **_):
    return [None if a is None else float(len(c) % 3) for c, a in zip(completions, answer)]

def nothing(completions):
    return [None] * len(completions)
"""
COMMANDS = {
    "grpo": "grpo --prompts-per-step 4 --group-size 3 --steps 3",
    "grpo, dynamic": "grpo --prompts-per-step 4 --group-size 3 --steps 3 --dynamic-sampling 1",
    "ppo": "ppo --prompts-per-step 4 --group-size 2 --minibatches 2 --steps 3",
    "rejection-sampling": "rejection-sampling --group-size 3 --top-k 2 --rounds 2 --batch-size 2",
}


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(MIXED)
    rows = [{"prompt": f"Word {i} is", **({"answer": str(i)} if i % 2 else {"task": "chat"})} for i in range(6)]
    write_rows(tmp_path / "p.jsonl", rows)
    write_rows(tmp_path / "held.jsonl", [{**row, "prompt": f"Held {i}"} for i, row in enumerate(rows)])
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_on_mixed_tasks(tiny, mixed, command, capsys):
    data = "--prompts p.jsonl --eval-prompts held.jsonl --eval-group-size 1"
    line = f"{COMMANDS[command]} --max-new-tokens 5 {data} --reward r.py:right"
    assert tether(line, "--model", tiny, "--out", "run") == 0, capsys.readouterr().err
    rows = read_rows(mixed / "run" / "metrics.jsonl")
    assert all(0 <= row["frac_reward_none"] < 1 for row in rows)
    assert command == "grpo, dynamic" or all(row["frac_reward_none"] > 0 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    found = json.loads((mixed / "run" / "summary.json").read_text())["evaluation"]["policy"]
    assert found["completions_without_reward"] == 3
    assert tether("report", "run") == 0
    line = "eval --prompts held.jsonl --reward r.py:right --max-new-tokens 5"
    assert tether(line, "--model", "run/model", "--reference", tiny) == 0
    assert '"completions_without_reward": 3' in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_to_which_nothing_applies_ends_at_its_first_step(tiny, mixed, command, capsys):
    line = f"{COMMANDS[command]} --max-new-tokens 5 --prompts p.jsonl --reward r.py:nothing"
    assert tether(line, "--model", tiny, "--out", "run") == 2
    assert "1: no reward applies to any completion of the step: all gave None" in capsys.readouterr().err


def test_scores_of_a_step_to_which_nothing_applied_are_not_kept(tiny, mixed, capsys):
    """The function is corrected and the run resumed: the completions are scored again."""
    line = "ppo --prompts-per-step 2 --steps 4 --save-every 1 --max-new-tokens 4 --prompts p.jsonl"
    (mixed / "late.py").write_text(
        "import os\n"
        "calls = []\n"
        "def late(completions):\n"
        "    calls.append(1)\n"
        "    broken = len(calls) == 3 and not os.path.exists('mended')\n"
        "    return [None if broken else 1.0] * len(completions)\n"
    )
    assert tether(line, "--reward", "late.py:late", "--model", tiny, "--out", "run") == 2
    assert "ppo step 3: no reward applies" in capsys.readouterr().err
    (mixed / "mended").touch()
    assert tether("resume run") == 0
    assert len(read_rows(mixed / "run" / "metrics.jsonl")) == 4
