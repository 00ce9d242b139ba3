"""``tether maze`` at a toy size: what it writes, and that its figures are those of dynamic programming."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from commandline import tether
from tether.algorithms import sft
from tether.algorithms.optimise import Optim
from tether.environments.maze import Maze, values
from tether.maze import Measured, Settings, example, moved, shortest, solve
from tether.models.loading import load_policy
from tether.models.policy import load_critic

SMALL = replace(
    Settings(),
    gammas=(0.9,),
    size=2,
    walls=1,
    moves=3,
    mazes=20,
    held_out=4,
    width=64,
    layers=1,
    steps=2,
    prompts_per_step=4,
    sft=sft.Config(epochs=1, batch_size=8, optim=Optim(learning_rate=1e-3)),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("maze") / "run"
    return out, solve(out, SMALL)


def test_what_it_writes(done):
    out, summary = done
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "maze.png").stat().st_size > 10_000
    row = summary["gamma"]["0.9"]
    assert row["best"] > row["random"]
    assert row["share_of_best"] == pytest.approx((row["return"] - row["random"]) / (row["best"] - row["random"]))
    for name in ("random", "sft/model", "ppo_0.9/model"):
        assert (out / name / "config.json").exists()


def test_a_perfect_policy_and_a_perfect_critic_are_found_perfect(done):
    """Both are replaced by what dynamic programming says."""
    out, _ = done
    policy, tokenizer = load_policy(str(out / "ppo_0.9/model"))
    measured = Measured(policy, tokenizer, load_critic(out / "ppo_0.9/critic.safetensors", policy), SMALL, 0.9)
    maze = Maze(("S.", "#G"))
    groups = measured.played([maze])
    judged, exact = measured.on_visited([maze], groups)
    assert judged.shape == exact.shape == (len(groups[0].completions[0].turns),)
    table = values(maze, gamma=0.9, moves=3)
    assert exact[0] == pytest.approx(table[3][(0, 0)])


def test_a_critic_that_was_saved_is_the_one_that_was_trained(done, tmp_path):
    out, _ = done
    policy, _ = load_policy(str(out / "ppo_0.9/model"))
    critic = load_critic(out / "ppo_0.9/critic.safetensors", policy)
    assert critic.trunk is None
    assert critic.head.weight.abs().sum() > 0  # it begins at zero
    assert not any(parameter.requires_grad for parameter in critic.parameters())


def test_the_example_is_a_detour_and_its_path_the_shortest():
    straight, detour = Maze(("S.G", "...", "...")), Maze(("S#G", "...", "..."))
    assert example([straight, detour, straight, detour]) == 1
    assert example([straight]) == 0
    assert shortest(detour) == [(0, 0), (1, 0), (1, 1), (1, 2), (0, 2)]
    assert moved(detour, (2, 2)).rows == (".#G", "...", "..S")


def test_a_gamma_is_one_of_its_own(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tether("maze --gamma 1.5") == 2
    assert "gamma must lie in [0, 1]" in capfd.readouterr().err
    assert tether("maze --gamma 1 --gamma 1.0") == 2
    assert not (tmp_path / "maze").exists()


def test_saving_the_critic_and_keeping_the_best_are_refused_together(capfd, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    assert tether(f"ppo --model {tiny} --prompts guess --env guess --out out --save-critic --keep-best reward") == 2
    assert "save_critic needs the policy of the last step" in capfd.readouterr().err


def test_a_critic_of_another_policy_is_refused(done, tiny):
    out, _ = done
    policy, _ = load_policy(str(tiny))
    with pytest.raises(Exception, match=r"critic.safetensors: no critic of this policy"):
        load_critic(out / "ppo_0.9/critic.safetensors", policy)
    assert torch.is_grad_enabled()
