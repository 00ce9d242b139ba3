"""Runs with an environment: interrupted and resumed, moved, given in Python, beside other rewards."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest

import tether as package
from commandline import assert_resumes, read_rows, tether, workspace
from tether.errors import ConfigError
from tether.generation.environment import Observation


class Letters:
    """Three turns, each worth half a vowel."""

    def reset(self, prompt, *, seed):
        self.turns = 0
        return Observation(text=" Go!")

    def step(self, action):
        self.turns += 1
        reward = sum(c in "aeiou" for c in action) / 2
        return Observation(text=f" {self.turns}:", reward=reward, done=self.turns == 3, info={"turns": self.turns})


GAMES = f"from tether import Observation\n\n{inspect.getsource(Letters)}"
"""The same in a file."""
EPISODES = "--env games.py:Letters --max-turns 4 --turn-tokens 3 --max-new-tokens 16"
STEPS = "--prompts p.jsonl --prompts-per-step 2 --group-size 2 --minibatches 2 --epochs-per-step 2 --steps 4"
LINES = {
    "ppo": f"ppo {STEPS} --discount turn --gamma 0.9",
    "grpo": f"grpo {STEPS}",
    "rejection-sampling": "rejection-sampling --prompts p.jsonl --group-size 3 --rounds 3 --batch-size 2",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "games.py").write_text(GAMES)
    return tmp_path


@pytest.mark.parametrize("name", LINES)
def test_a_run_resumes_bitwise(name, tiny):
    held_out = "--eval-prompts held_prompts.jsonl --eval-every 2 --eval-group-size 1"
    every = "--eval-every 1" if name == "rejection-sampling" else ""
    assert_resumes(f"{LINES[name]} {EPISODES} {held_out} {every} --quiet --model {tiny}")


def test_what_is_recorded(here, tiny):
    line = f"{LINES['grpo']} {EPISODES} --reward length:8=0.5 --env-weight 2 --model {tiny} --out out --quiet"
    assert tether(line) == 0
    for row in read_rows(here / "out/metrics.jsonl"):
        whole = 2 * row["rewards/Letters/mean"] + 0.5 * row["rewards/length/mean"]
        assert row["reward"] == pytest.approx(whole, abs=1e-5)
        assert row["rewards/Letters/turns/mean"] == row["episodes/turns"] == 3
        assert row["episodes/shown_tokens"] > 0
    config = (here / "out/config.yaml").read_text()
    assert f"env: {here / 'games.py'}:Letters" in config


def test_a_run_that_was_moved_with_its_environment_resumes(here, tiny):
    assert tether(f"{LINES['grpo']} {EPISODES} --model {tiny} --out out --quiet --keep-checkpoints") == 0
    other = here / "other"
    other.mkdir()
    shutil.move(here / "out", other / "out")
    shutil.move(here / "games.py", other / "games.py")
    line = f"resume other/out --steps 5 --allow --env {other / 'games.py'}:Letters"
    assert tether(line) == 0
    assert len(read_rows(other / "out/metrics.jsonl")) == 5


def test_another_environment_is_another_run(here, tiny, capfd):
    (here / "games.py").write_text(GAMES + "class Other(Letters):\n    pass\n")
    assert tether(f"{LINES['grpo']} {EPISODES} --model {tiny} --out out --quiet --keep-checkpoints") == 0
    assert tether("resume out --steps 5 --allow --env games.py:Other") == 2
    assert "env cannot change in a run" in capfd.readouterr().err


def test_an_environment_that_fails_stops_the_run_with_its_name(here, tiny, capfd):
    (here / "games.py").write_text(GAMES.replace("self.turns += 1", "self.turns += 1 / 0"))
    assert tether(f"{LINES['ppo']} {EPISODES} --model {tiny} --out out --quiet") == 2
    said = capfd.readouterr().err
    assert "ppo step 1: Letters: it raised an error: ZeroDivisionError" in said


def test_an_environment_from_python(here, tiny):
    common = {
        "model": tiny, "prompts": ["a", "b"], "max_turns": 4, "turn_tokens": 3, "max_new_tokens": 16, "seed": 1,
        "steps": 2, "prompts_per_step": 2, "group_size": 2, "quiet": True,
    }  # fmt: skip
    one = package.grpo.run(env=Letters, out="one", **common)
    package.grpo.run(env="games.py:Letters", out="other", **common)
    rows = [
        [{k: v for k, v in row.items() if k.startswith(("rewards/", "loss", "kl"))} for row in read_rows(here / path)]
        for path in ("one/metrics.jsonl", "other/metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    assert json.loads((here / "one/summary.json").read_text())["last"]["step"] == 2
    with pytest.raises(ConfigError, match="were given in Python"):
        package.grpo.run(out="one", resume=True, allow=True, model=tiny, prompts=["a", "b"], steps=3)
    groups = package.generate(one, ["a"], env=Letters, max_turns=4, turn_tokens=3, max_new_tokens=16)
    assert len(groups[0].completions[0].turns) == 3
    found = package.evaluate(one, tiny, ["a", "b"], env=Letters, max_turns=4, turn_tokens=3, max_new_tokens=16)
    assert set(found.policy.rewards) == {"Letters", "Letters/turns"}


def test_generated_prompts_and_a_built_in_environment(here, tiny):
    line = "ppo --prompts guess:count=4,largest=3 --env guess --max-turns 3 --turn-tokens 1 --max-new-tokens 40"
    assert tether(f"{line} --prompts-per-step 4 --steps 1 --model {tiny} --out out --quiet") == 0
    (row,) = read_rows(here / "out/metrics.jsonl")
    assert -3 <= row["rewards/guess/mean"] <= 0
    assert "prompts: guess:count=4,largest=3" in (here / "out/config.yaml").read_text()


def test_no_reward_at_all_is_one_line(tiny, capfd):
    assert tether(f"{LINES['grpo']} --model {tiny} --out out") == 2
    assert "reward must hold one, unless there is an env" in capfd.readouterr().err
