"""``tether eval`` of policies: one and several, as JSON and as tables, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from commandline import tether, workspace
from tiny import make_model

LINE = "eval --prompts p.jsonl --reward r.py:fn --max-new-tokens 4"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture
def other(here):
    return make_model(here / "other", seed=1)


def found(capsys, line: str) -> dict:
    assert tether(line) == 0
    return json.loads(capsys.readouterr().out)


def test_what_one_policy_has(tiny, here, capsys):
    line = f"{LINE} --model {tiny} --group-size 4 --pass-at 1,2 4 --pass-above 1 --majority-at 1"
    alone = found(capsys, line)
    assert alone.keys() == {
        "model", "reference", "prompts", "completions", "completions_without_reward", "reward", "reward_ci95",
        "rewards", "rewards_ci95", "mean_length", "distinct_2", "pass_at", "majority_at", "best_of_n",
    }  # fmt: skip
    assert [one["k"] for one in alone["pass_at"]] == [1, 2, 4]
    assert [one["n"] for one in alone["best_of_n"]] == [1, 2, 4]
    assert alone["best_of_n"][0]["reward"] == pytest.approx(alone["reward"])
    assert alone["rewards_ci95"]["fn"] == pytest.approx(alone["reward_ci95"])
    with_itself = found(capsys, f"{line} --reference {tiny}")
    assert with_itself.keys() == {*alone, "kl", "kl_ci95", "win_rate", "against_reference"}
    beside = with_itself["against_reference"]
    assert beside["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert beside["length_controlled_win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert {name: with_itself[name] for name in alone if name != "reference"} == {
        name: value for name, value in alone.items() if name != "reference"
    }


def test_several_policies_have_the_figures_that_they_have_alone(tiny, other, capsys):
    line = f"{LINE} --group-size 2 --reference {tiny}"
    both = found(capsys, f"{line} --model {other} --model {tiny}")
    assert [one["model"] for one in both["models"]] == [str(other), tiny]
    assert both["reference"] == tiny
    (pair,) = both["comparisons"]
    assert {pair["a"], pair["b"]} == {str(other), tiny}
    assert pair["difference"]["value"] >= 0
    assert both["comparison_level"] == pytest.approx(0.95)
    for model in both["models"]:
        alone = found(capsys, f"{line} --model {model['model']}")
        assert alone == model
    first, second = both["models"]
    sign = 1 if pair["a"] == str(other) else -1
    assert sign * pair["difference"]["value"] == pytest.approx(first["reward"] - second["reward"])
    against = first["against_reference"]  # the other policy is the reference
    assert sign * pair["difference"]["value"] == pytest.approx(against["difference"]["value"])
    assert found(capsys, f"{line} --model {other} --model {tiny}") == both  # whatever was sampled before


def test_the_order_of_the_models_changes_nothing(tiny, other, capsys):
    there = found(capsys, f"{LINE} --group-size 2 --model {other} --model {tiny}")
    back = found(capsys, f"{LINE} --group-size 2 --model {tiny} --model {other}")
    assert there["models"] == back["models"][::-1]
    assert there["comparisons"] == back["comparisons"]


def test_a_file_of_options(tiny, other, here, capsys):
    lines = [f"model: [{tiny}, {other}]", "reward: r.py:fn", "prompts: p.jsonl", "max_new_tokens: 4", "group_size: 2"]
    (here / "eval.yaml").write_text("\n".join([*lines, "pass_at: 2"]))
    both = found(capsys, "eval --config eval.yaml")
    assert [one["pass_at"][0]["k"] for one in both["models"]] == [2, 2]
    (here / "eval.yaml").write_text("\n".join([*lines, "pass_at: 1,2"]))
    assert len(found(capsys, "eval --config eval.yaml")["models"][0]["pass_at"]) == 2


def test_tables_on_a_terminal(tiny, other, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    line = f"{LINE} --model {tiny} --model {other} --reference {tiny} --group-size 2 --pass-at 2 --reward length:2=0"
    assert tether(line) == 0
    text = capsys.readouterr().out
    for word in ("vs reference", "equal length", "pass@2", "best of 2", "KL at most", "told apart", "length", "other"):
        assert word in text
    assert "5 prompts, 10 completions of each model" in " ".join(text.split())
    assert tether(f"{line} --json") == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2
    assert tether(f"{LINE} --model {tiny} --group-size 2 --reward length:2=0") == 0
    alone = capsys.readouterr().out
    assert "vs reference" not in alone
    assert "told apart" not in alone
    assert "best of 2" in alone


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--model {tiny}", ("give each model once", "given twice")),
        ("--pass-at 1,4", ("pass_at is 4", "2 completions per prompt", "--group-size 4")),
        ("--majority-at 3", ("majority_at is 3", "--group-size 3")),
        ("--pass-at 0", ("pass_at must be at least 1",)),
        ("--pass-at 1,x", ("--pass-at", "integer", "'x'")),
        ("--pass-at 2 --temperature 0", ("temperature 0", "the same")),
        ("--majority-at 1 --env guess", ("majority_at", "env", "leave it out")),
        ("--pass-above nan", ("--pass-above", "finite")),
    ],
)
def test_what_cannot_work_is_said_in_one_line(more, says, tiny, here, capsys):
    assert tether(f"{LINE} --group-size 2 --model {tiny} {more.format(tiny=tiny)}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    for words in says:
        assert words in line


def test_attempts_are_for_policies(tiny, here, capsys):
    assert tether("eval --reward-model m --pairs pairs.jsonl --pass-at 1") == 2
    assert "pass_at and majority_at are for policies" in capsys.readouterr().err


def test_policies_of_another_vocabulary_or_template_are_refused(tiny, here, capsys):
    stranger = make_model(here / "stranger", seed=1)
    file = here / "stranger" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    assert tether(f"{LINE} --model {tiny} --model {stranger}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tether eval: --model {stranger}: its tokenizer is not that of {tiny}")


def test_policies_that_read_the_prompts_differently_are_refused(here, capsys):
    plain, chat = make_model(here / "plain", template=True), make_model(here / "chat", template=True, seed=1)
    config = here / "chat" / "chat_template.jinja"
    config.write_text(config.read_text() + "!")
    turns = [{"prompt": [{"role": "user", "content": f"Hello {i}"}]} for i in range(3)]
    (here / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    assert tether(f"eval --prompts p.jsonl --reward length:3 --max-new-tokens 4 --model {plain} --model {chat}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it reads the prompts as other tokens than" in line


def test_a_policy_is_given_up_before_the_next_is_loaded(tiny, other, capsys, monkeypatch):
    """Besides the reference, one at most is in memory."""
    import gc
    import weakref

    from tether.looking import evaluate

    alive, most = [], []
    load = evaluate.load_model

    def counted(name, device):
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        loaded = load(name, device)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(evaluate, "load_model", counted)
    third = make_model(other.replace("other", "third"), seed=2)
    found(capsys, f"{LINE} --model {tiny} --model {other} --model {third}")
    assert most == [0, 0, 0]
