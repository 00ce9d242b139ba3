"""The names that ``import tether`` gives, the examples, and the Python of the README."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tether
from tether.types import PreferencePair

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


HEAVY = ("torch", "transformers", "numpy", "matplotlib", "datasets", "pyarrow", "peft")


def test_import_alone_is_light():
    code = f"import sys, tether; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_loads_no_extra():
    """All that a training loop needs, from Python or from the command line."""
    code = (
        "import sys, tether\n"
        "from tether.commands import TABLE\n"
        "[getattr(tether, name) for name in tether.__all__]\n"
        "[command.function() for command in TABLE]\n"
        f"print([name for name in {HEAVY[3:]} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there_and_is_what_type_checkers_see():
    tree = ast.parse(Path(tether.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == tether._HOME
    assert sorted({*typed, "__version__"}) == sorted(tether.__all__)
    assert set(tether.__all__) <= set(dir(tether))
    for name in typed:
        assert getattr(tether, name).__name__.rsplit(".", 1)[-1] == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'grop'"):
        _ = tether.grop


def test_own_loop_learns(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](3)
    lines = capsys.readouterr().out
    rewards = [float(value) for value in re.findall(r"reward (\S+)", lines)]
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0]
    assert "before: When the old woman opened the door, she" in lines
    assert "after:  When the old woman opened the door, she" in lines


def test_the_example_rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from rewards import short_words, speech

    assert speech(completions=['"No," said he.', "He said no."], prompts=["", ""]) == [1.0, 0.0]
    assert short_words(completions=["a bcd", " "]) == [-2.0, None]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    one_call, own_loop = blocks
    short = [(one_call, "steps=5", "steps=1"), (own_loop, "STEPS = 20", "STEPS = 2")]
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for block, steps, fewer in short:
        assert steps in block
        exec(compile(block.replace(steps, fewer), "README.md", "exec"), {"__name__": "readme"})
        printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert (tmp_path / "aligned" / "model.safetensors").is_file()


def test_reward_model_training_in_your_own_loop(tiny, tmp_path):
    data = [
        {"prompt": "Say", "chosen": f" yes {i}", "rejected": f" no {i}" if i % 2 else f" never {i}"} for i in range(24)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    model, tokenizer = tether.new_reward_model(tiny, seed=0)
    pairs = tether.load_pairs(str(file), tokenizer, context=tether.context_length(model))
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    config = tether.reward_model.Config(epochs=6, batch_size=8, optim=tether.Optim(learning_rate=3e-3))
    state = tether.reward_model.State.create(model, len(pairs), config, seed=0)
    before = tether.reward_model.evaluate(model, pairs, token_budget=4096)
    while state.step < state.total_steps:
        result = tether.reward_model.step(state, state.cursor.take(pairs, config.batch_size), config=config)
    after = tether.reward_model.evaluate(model, pairs, token_budget=4096)
    assert result.metrics["loss"] < before.log_loss
    assert after.log_loss < before.log_loss
    tether.save_reward_model(model, tokenizer, tmp_path / "judge", tether.reward_model.sides(pairs[:4]))
    score = tether.resolve_scorer([str(tmp_path / "judge")], tokenizer)
    assert [reward.name for reward, _ in score.rewards] == ["judge"]
