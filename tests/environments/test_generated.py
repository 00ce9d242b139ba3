"""Rows that are made on demand, and environments by their names."""

from __future__ import annotations

import pytest

from commandline import read_rows, tether, write_rows
from tether.data.memory import Rows
from tether.environments.generated import KINDS, made
from tether.environments.loading import BUILT_IN, load_environment
from tether.errors import DataError, EpisodeError, RewardError
from tether.rewards.loading import Sources


@pytest.mark.parametrize("name", KINDS)
def test_the_same_text_makes_the_same_rows(name):
    found = made(f"{name}:count=20,seed=4")
    assert isinstance(found, Rows)
    assert found == made(f"{name}:seed=4,count=20") or found.values == made(f"{name}:seed=4,count=20").values
    assert len(found.values) == 20
    assert found.values != made(f"{name}:count=20,seed=5").values
    assert all(row["prompt"] and row["completion"] for row in found.values)


def test_other_sources_stay_as_they_are():
    rows = Rows("maze", ())
    assert made("./maze") == "./maze"
    assert made("maze.jsonl") == "maze.jsonl"
    assert made("owner/maze") == "owner/maze"
    assert made(rows) is rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("maze:count", "count is a whole number from 1 to 1000000, not ''"),
        ("maze:count=0", "from 1 to"),
        ("maze:count=x", "not 'x'"),
        ("maze:walls=-1", "from 0 to 60"),
        ("maze:sise=4", "no option 'sise'; did you mean size"),
        ("maze:size=2,walls=1,count=500", "not 500 different mazes"),
        ("maze:size=2,walls=3", "has no room"),
        ("arithmetic:largest=1,count=9", "not 9 different problems"),
        ("problems:largest=2,count=200", "not 200 different problems"),
    ],
)
def test_what_cannot_be_made_is_one_line(source, message):
    with pytest.raises(DataError, match=message):
        made(source)


@pytest.mark.parametrize("spec", BUILT_IN)
def test_what_is_built_in_can_be_made(spec):
    name, make = load_environment(spec, sources=Sources(), objects={})
    assert name == spec.partition(":")[0]
    assert hasattr(make(), "step")


GAMES = """
from tether import Observation
class Echo:
    def reset(self, prompt, *, seed): return Observation()
    def step(self, action): return Observation(text="!", reward=float(len(action)))
class NoStep:
    def reset(self, prompt, *, seed): return Observation()
class NoSeed:
    def reset(self, prompt): ...
    def step(self, action): ...
class Needs:
    def __init__(self, size): ...
number = 3
"""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gues", "no such environment; did you mean guess"),
        ("games.py", "name the class too"),
        ("games.py:Nothing", "has no environment 'Nothing'; it has Echo"),
        ("games.py:number", "has no environment 'number'"),
        ("games.py:NoStep", "NoStep has no method 'step'"),
        ("games.py:NoSeed", r"'reset' is called as reset\(prompt, \*, seed\)"),
        ("games.py:Needs", "could not be made: TypeError"),
        ("nothing.py:X", "no such file to import"),
        ("no_such_module:X", "no environment has this name"),
    ],
)
def test_what_is_no_environment_is_one_line(tmp_path, spec, message):
    (tmp_path / "games.py").write_text(GAMES)
    with pytest.raises((EpisodeError, RewardError), match=message):
        load_environment(spec, sources=Sources(tmp_path), objects={})


def test_generate_writes_the_rewards_of_the_turns(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "games.py").write_text(GAMES)
    write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    episodes = "--env games.py:Echo --max-turns 2 --turn-tokens 2 --max-new-tokens 5"
    assert tether(f"generate --model {tiny} --prompts p.jsonl {episodes} --out found.jsonl") == 0
    for row in read_rows(tmp_path / "found.jsonl"):
        assert len(row["turn_rewards"]) == 2
        assert row["finish_reason"] == "length"
        assert row["completion"].count("!") >= 1


def test_options_of_episodes_need_an_environment(tmp_path, monkeypatch, tiny, capfd):
    monkeypatch.chdir(tmp_path)
    assert tether(f"generate --model {tiny} --prompts guess --turn-tokens 2") == 2
    assert "turn_tokens needs an environment; give --env" in capfd.readouterr().err
