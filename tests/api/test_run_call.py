"""``tether.grpo.run`` and its siblings: arguments, what they do with Python objects, and what their errors say."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import threading

import pytest
import torch

import tether
from commandline import tether as shell
from commandline import workspace, write_rows
from tether.commands import TABLE, find
from tether.flags import options_of
from tether.models.loading import load_policy
from tiny import make_model

MODULES = {
    "sft": "sft",
    "reward_model": "reward",
    "rejection_sampling": "rejection-sampling",
    "ppo": "ppo",
    "grpo": "grpo",
}
PROMPTS = [f"Word {i} is" for i in range(5)]
SMALL = {
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 4,
    "quiet": True,
    "matmul_dtype": "float32",
}


def lengths(completions, **_):
    return [float(len(c) % 5) for c in completions]


def grpo(tiny, **arguments):
    return tether.grpo.run(**{"model": tiny, "prompts": PROMPTS, "rewards": lengths, **SMALL, **arguments})


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("module", "command"), MODULES.items())
def test_the_signature_has_the_options_of_the_command(module, command):
    run = getattr(tether, module).run
    signature = inspect.signature(run)
    row = find(command, TABLE)
    assert row is not None
    options = {option.name: option for option in options_of(row.options_class())}
    renamed = {"rewards": "reward", "eval_rewards": "eval_reward"}
    python = {"tokenizer", "on_step", "monitors", "optimizer", "resume", "allow"}
    own = {renamed.get(name, name): one for name, one in signature.parameters.items() if name not in python}
    assert own.keys() == options.keys()
    assert python < signature.parameters.keys()
    assert signature.return_annotation is tether.Run
    for name, option in options.items():
        if name == "out":
            assert own[name].default is None
        else:
            given = own[name].default
            assert (given is inspect.Parameter.empty) == (repr(option.default).startswith("<dataclasses._MISSING"))
            assert given is inspect.Parameter.empty or given == option.default
        assert f"\n{own[name].name}\n    " in run.__doc__
    assert run.__doc__.startswith(inspect.getdoc(row.options_class()))
    assert run.__module__ == f"tether.{module}"


def test_the_run_of_a_call_is_that_of_the_command(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    line = "--steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 4 --matmul-dtype float32 --quiet"
    assert shell(f"grpo --model {tiny} --prompts p.jsonl --reward r.py:fn --out ran {line}") == 0
    rows = [{"prompt": f"Word {i} is", "answer": str(i)} for i in range(5)]
    run = grpo(tiny, prompts=rows, rewards={"fn": lengths})
    assert [row["reward"] for row in run.metrics] == [row["reward"] for row in tether.Run("ran").metrics]
    assert same_weights(run.model, tether.Run("ran").model)


def test_all_commands(tiny):
    quick = {"model": tiny, "quiet": True}
    sft = tether.sft.run(data={"prompt": ["Say"] * 4, "completion": [" a", " b", " c", " d"]}, batch_size=2, **quick)
    assert sft.command == "sft"
    pairs = [{"prompt": f"Q{i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(20)]
    judge = tether.reward_model.run(pairs=pairs, epochs=1, batch_size=6, **quick)
    assert 0 <= judge.summary["accuracy"] <= 1
    assert "SequenceClassification" in type(judge.model).__name__
    common = {"prompts": PROMPTS, "rewards": judge.model_path, "max_new_tokens": 4, **quick}
    best = tether.rejection_sampling.run(**common, group_size=2, rounds=1)
    assert len(best.metrics) == 1
    ppo = tether.ppo.run(**{**common, "model": sft}, steps=1, prompts_per_step=2, group_size=1)
    assert ppo.options["model"] == str(sft.model_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"klcoef": 1}, tether.ConfigError, "unknown argument 'klcoef'; did you mean kl_coef?"),
        ({"beta": 0.1}, tether.ConfigError, "unknown argument 'beta'; use kl_coef"),
        ({"reward_funcs": lengths}, tether.ConfigError, "unknown argument 'reward_funcs'; use rewards"),
        ({"reward": lengths}, tether.ConfigError, "unknown argument 'reward'; did you mean rewards"),
        ({"kl_coef": -1}, tether.ConfigError, "kl_coef must be 0 or more, found -1"),
        ({"kl_coef": "x"}, tether.ConfigError, "kl_coef: input should be a valid number"),
        ({"steps": 2.5}, tether.ConfigError, "steps: input should be a valid integer"),
        ({"rewards": None}, tether.ConfigError, "reward must hold one, unless there is an env"),
        ({"rewards": []}, tether.ConfigError, "rewards must hold at least one"),
        ({"rewards": "lenght:3"}, tether.RewardError, "lenght"),
        ({"model": None}, tether.ConfigError, "missing: model"),
        ({"model": 3}, tether.ConfigError, "model: found int; give a directory"),
        ({"tokenizer": 3}, tether.ConfigError, "tokenizer: is for a model in memory; leave it out"),
        ({"prompts": ["a", ""]}, tether.DataError, "prompts:row 2: prompt is empty"),
        ({"prompts": [{"text": "a"}]}, tether.DataError, "prompts:row 1: column 'prompt' is missing"),
        ({"max_new_tokens": 4096}, tether.ConfigError, "give max_new_tokens less than"),
        ({"resume": True}, tether.ConfigError, "there is no run to resume without out; give out="),
        ({"optimizer": 3}, tether.ConfigError, "optimizer: found 3; give a torch optimizer"),
        ({"out": 3}, tether.ConfigError, "out: found 3; give the path of the run directory"),
        ({"on_step": 3}, tether.ConfigError, "on_step: found 3; give a function, or a list of such"),
        ({"on_step": [print, "x"]}, tether.ConfigError, "on_step: found 'x'; give a function"),
        ({"monitors": print}, tether.ConfigError, "give a monitor, or a list of such"),
    ],
)
def test_errors_name_the_argument(tiny, arguments, error, message):
    with pytest.raises(error) as caught:
        grpo(tiny, **arguments)
    assert message in str(caught.value)
    assert "--" not in str(caught.value).replace("---", "")


def test_a_model_in_memory_is_not_changed(tiny):
    model, tokenizer = load_policy(tiny)
    before, _ = load_policy(tiny)
    first = grpo(tiny, model=model, tokenizer=tokenizer)
    again = grpo(tiny, model=model, tokenizer=tokenizer)
    assert same_weights(model, before)
    assert not same_weights(first.model, model)
    assert same_weights(first.model, again.model)  # a cell that is run twice
    assert same_weights(first.model, grpo(tiny).model)
    assert first.options["model"] == "<model given in Python>"
    with pytest.raises(tether.ConfigError, match="model: a model in memory needs its tokenizer; give tokenizer="):
        grpo(tiny, model=model)


def test_a_broken_model_in_memory_is_named_model(tiny):
    model, tokenizer = load_policy(tiny)
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    with pytest.raises(tether.ModelError, match=r"^model: .* not finite"):
        grpo(tiny, model=model, tokenizer=tokenizer)


def test_without_out_nothing_is_left(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = grpo(tiny)
    path = run.path
    assert path.is_dir()
    assert list(tmp_path.iterdir()) == []
    kept = run.save(tmp_path / "kept")
    del run
    gc.collect()
    assert not path.exists()
    assert kept.metrics
    assert same_weights(kept.model, tether.Run(tmp_path / "kept").model)


def test_a_failed_call_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(tether.RewardError, match="raised ZeroDivisionError"):
        grpo(tiny, rewards=lambda completions: [1 / 0 for _ in completions])
    assert list(tmp_path.iterdir()) == []


def test_rewards_of_every_kind_add_up(tiny, tmp_path):
    async def later(completions, **_):
        await asyncio.sleep(0)
        return [2.0 for _ in completions]

    rewards = {"a": (lengths, 0.5), "rule": "length:3", "later": later, "own": tether.FunctionReward("x", lengths)}
    row = grpo(tiny, rewards=rewards).metrics[0]
    total = 0.5 * row["rewards/a/mean"] + row["rewards/rule/mean"] + 2.0 + row["rewards/own/mean"]
    assert row["rewards/later/mean"] == 2.0
    assert row["reward"] == pytest.approx(total, rel=1e-6)


def test_a_call_within_a_running_loop(tiny):
    async def later(completions, **_):
        await asyncio.sleep(0)
        return lengths(completions)

    async def cell():
        return grpo(tiny, rewards=later)

    assert asyncio.run(cell()).metrics[-1]["step"] == 2.0


def test_hooks_and_monitors(tiny):
    seen = []

    def stop(record):
        seen.append(record)
        return tether.Stop(reason="enough") if record.step == 2 else None

    run = grpo(tiny, steps=5, on_step=[stop, lambda _: None])
    assert [record.step for record in seen] == [1, 2]
    assert seen[0].metrics == run.metrics[0]
    assert seen[0].total == 5
    assert len(seen[0].groups) == 2
    assert run.summary["ended"] == "enough"


@pytest.mark.parametrize("kind", ["class", "partial", "instance", "function"])
def test_an_optimizer_of_ones_own(tiny, kind):
    model, tokenizer = load_policy(tiny)
    given = {
        "class": torch.optim.SGD,
        "partial": functools.partial(torch.optim.SGD, lr=0.5),
        "instance": torch.optim.SGD(model.parameters(), lr=0.5),
        "function": lambda groups: torch.optim.SGD(groups, lr=0.5),
    }[kind]
    run = grpo(tiny, model=model, tokenizer=tokenizer, optimizer=given, lr_schedule="constant", max_grad_norm=1e9)
    assert run.metrics[-1]["learning_rate"] == (1e-3 if kind == "class" else 0.5)
    if kind == "instance":
        assert same_weights(model, load_policy(tiny)[0])


def test_another_thread_is_one_clear_error(tiny):
    found = []

    def call():
        try:
            grpo(tiny)
        except tether.ConfigError as error:
            found.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found[0].startswith("a run needs the main thread")


def test_rows_of_a_file_and_of_memory_make_one_run(tiny, tmp_path):
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    assert same_weights(grpo(tiny, prompts=file).model, grpo(tiny, prompts=PROMPTS).model)


def test_an_evaluation_reward_is_reported_and_not_trained_on(tiny):
    pandas = pytest.importorskip("pandas")
    held_out = pandas.DataFrame({"prompt": ["Another", "One more"]})

    def judge(completions, **_):
        return [1.0 for _ in completions]

    plain = grpo(tiny)
    judged = grpo(tiny, eval_prompts=held_out, eval_rewards=judge, eval_every=1, eval_group_size=2)
    assert judged.metrics[-1]["eval/rewards/judge"] == 1.0
    assert same_weights(plain.model, judged.model)
    assert judged.options["eval_reward"] == ["judge:=<reward judge given in Python>"]


def test_conversations(tmp_path):
    directory = make_model(tmp_path / "m", template=True)
    seen = []

    def turns(prompts, completions):
        seen.append((prompts[0], completions[0]))
        return [0.0 for _ in completions]

    grpo(directory, prompts=[[{"role": "user", "content": "Hi"}]] * 2, rewards=turns, steps=1)
    prompt, completion = seen[0]
    assert prompt == [{"role": "user", "content": "Hi"}]
    assert completion[0]["role"] == "assistant"
