"""The commands one after another on a real pretrained model, and an optimum reached through a command alone."""

from __future__ import annotations

import json

import pytest
import torch

from commandline import read_rows, tether, write_rows
from enumerable import Space, total_variation, write_problem
from tether.models.loading import load_policy

OPENINGS = (
    "Once upon a time, there was a little",
    "Tom had a big red",
    "The dog ran to the",
    "Lily and her mom went to",
)
HAPPY = (
    " boy who was happy and kind.",
    " ball and he loved it.",
    " park to play with friends.",
    " the sunny beach to have fun.",
)
SAD = (" boy who was sad and hurt.", " cut and he cried a lot.", " dark and scary hole.", " the cold grave and wept.")


@pytest.mark.slow
def test_the_whole_pipeline_on_a_real_model(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"prompt": opening} for opening in OPENINGS])
    pairs = [
        {"prompt": opening, "chosen": chosen, "rejected": rejected}
        for opening in OPENINGS
        for chosen, rejected in zip(HAPPY, SAD, strict=True)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    assert tether(f"reward --model {stories} --pairs pairs.jsonl --batch-size 4 --learning-rate 1e-3 --out judge") == 0
    task = "--prompts p.jsonl --reward judge/model --max-new-tokens 12 --seed 0"
    small = f"--model {stories} {task} --learning-rate 1e-4"
    sizes = "--kl-coef 0.05 --group-size 4 --steps 2 --prompts-per-step 3"
    assert tether(f"rejection-sampling {small} --group-size 4 --top-k 1 --rounds 2 --out rs") == 0
    assert tether(f"ppo {small} {sizes} --out ppo") == 0
    assert tether(f"grpo {small} {sizes} --out grpo") == 0
    for run in ("judge", "rs", "ppo", "grpo"):
        assert tether(f"report {run}") == 0
        files = {path.name for path in (tmp_path / run).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "summary.json", "model", "report.html"} <= files
    capsys.readouterr()
    for policy in ("rs", "ppo", "grpo"):
        assert len(read_rows(tmp_path / policy / "metrics.jsonl")) == 2
        assert tether(f"eval --model {policy}/model --reference {stories} {task} --group-size 2") == 0
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["kl"] < 30
        assert 0 <= found["win_rate"] <= 1
        assert (
            tether(f"generate --model {policy}/model --prompts p.jsonl --max-new-tokens 12 --out {policy}.jsonl") == 0
        )
        assert len(read_rows(tmp_path / f"{policy}.jsonl")) == len(OPENINGS)
    assert tether("eval --reward-model judge/model --pairs pairs.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.6  # they are the pairs it was trained on


BETA = 0.5


@pytest.mark.slow
def test_grpo_reaches_the_optimum_through_its_command_alone(tmp_path, monkeypatch):
    """pi_ref exp(r / beta) / Z over all completions of two tokens, from a model and a reward function on disk."""
    monkeypatch.chdir(tmp_path)
    space = Space.of(8, 2, seed=1)
    prompt = write_problem(tmp_path, space, seed=1)
    line = (
        f"grpo --model model --prompts prompts.jsonl --reward reward.py:fn --kl-coef {BETA} --steps 100 "
        "--prompts-per-step 2 --group-size 64 --max-new-tokens 2 --temperature 1 --learning-rate 1.5e-3 --seed 0 "
        "--out out --advantage-scale none --kl-estimator k2 --rollouts-every 0 --quiet"
    )
    assert tether(line) == 0
    with torch.no_grad():
        reference, found = (space.logprobs(load_policy(name)[0], prompt=prompt) for name in ("model", "out/model"))
    optimum, other = space.reverse_optimum(reference, BETA), space.forward_optimum(reference, BETA)
    assert total_variation(reference.exp(), optimum) > 0.1  # it is not there already
    assert total_variation(found.exp(), other) > 0.05  # nor at the other one
    assert total_variation(found.exp(), optimum) < 0.03
