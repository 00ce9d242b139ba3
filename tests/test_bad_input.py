"""Bad input: one line that says what, where and what to do; exit code 2; and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from commandline import contents, read_rows, tether, workspace, write_rows
from runs import GRPO, PPO, REWARD, RS, SFT, TASK
from tiny import make_model

PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@dataclass(frozen=True)
class Case:
    """A command line, what its one line of complaint must hold, and the file or directory that is wrong."""

    line: str
    says: tuple[str, ...]
    file: tuple[str, str] | None = None
    prepare: Callable[[Path, str], object] | None = None


def reward_file(body: str) -> tuple[str, str]:
    return "bad.py", f"def fn(prompts, completions, **_):\n    {body}\n"


def model_without_weights(here: Path, tiny: str) -> None:
    shutil.copytree(tiny, here / "m")
    (here / "m" / "model.safetensors").unlink()


def model_with_another_tokenizer(here: Path, tiny: str) -> None:
    shutil.copytree(tiny, here / "m")
    file = here / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 9999
    file.write_text(json.dumps(content))


def a_run(here: Path, _: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "config.yaml").write_text("format: 2\ncommand: grpo\n")
    (here / "out" / "metrics.jsonl").write_text('{"step": 1.0}\n')


def not_a_run(here: Path, _: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years of work")


CASES = {
    # files
    "missing file": Case(f"{GRPO} --prompts nope.jsonl --reward r.py:fn", ("nope.jsonl", "no such file")),
    "missing pairs": Case(f"{REWARD} nope.jsonl", ("nope.jsonl", "no such file")),
    "malformed JSON": Case(f"{SFT} bad.jsonl", ("bad.jsonl:2", "JSON"), ("bad.jsonl", '{"text": "a"}\n{"text": "b"\n')),
    "unknown format": Case(f"{SFT} bad.doc", ("bad.doc", ".jsonl"), ("bad.doc", "a")),
    "empty file": Case(f"{SFT} bad.jsonl", ("bad.jsonl", "no rows"), ("bad.jsonl", "\n")),
    "a directory of no data": Case(
        f"{GRPO} --prompts empty --reward r.py:fn", ("empty",), prepare=lambda here, _: (here / "empty").mkdir()
    ),
    # rows
    "missing column": Case(
        f"{GRPO} --prompts bad.jsonl --reward r.py:fn", ("bad.jsonl:1", "'prompt'"), ("bad.jsonl", '{"text": "a"}\n')
    ),
    "missing column of a pair": Case(
        f"{REWARD} bad.jsonl", ("bad.jsonl:2", "'rejected'"), ("bad.jsonl", f'{PAIR}{{"chosen": "a"}}\n')
    ),
    "empty prompt": Case(
        f"{GRPO} --prompts bad.jsonl --reward r.py:fn",
        ("bad.jsonl:2", "prompt is empty"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n'),
    ),
    "empty completion": Case(
        f"{SFT} bad.jsonl", ("bad.jsonl:1", "completion is empty"), ("bad.jsonl", '{"prompt": "a", "completion": ""}\n')
    ),
    "prompt longer than the context": Case(
        f"{GRPO} --prompts bad.jsonl --reward r.py:fn",
        ("bad.jsonl:1", "context is 128", "--overlong drop"),
        ("bad.jsonl", '{"prompt": "' + "a" * 200 + '"}\n'),
    ),
    "equal sides": Case(
        f"{REWARD} bad.jsonl",
        ("bad.jsonl:2", "equal"),
        ("bad.jsonl", f'{PAIR}{{"prompt": "a", "chosen": "b", "rejected": "b"}}\n'),
    ),
    "too few pairs to hold any out": Case(f"{REWARD} bad.jsonl", ("bad.jsonl", "--eval-pairs"), ("bad.jsonl", PAIR)),
    # models
    "unknown model": Case(f"{TASK} --model nope", ("nope", "no such model")),
    "model that is a file": Case(f"{TASK} --model p.jsonl", ("p.jsonl", "directory")),
    "model without weights": Case(f"{TASK} --model m", ("m:", "model.safetensors"), prepare=model_without_weights),
    "mismatched tokenizer": Case(f"{TASK} --model m", ("m:", "9999", "264"), prepare=model_with_another_tokenizer),
    "reference of another vocabulary": Case(
        "eval --model {tiny} --prompts p.jsonl --reward r.py:fn --reference {stranger}", ("--reference", "tokenizer")
    ),
    # rewards
    "reward that raises": Case(
        f"{GRPO} --prompts p.jsonl --reward bad.py:fn",
        ("grpo step 1", "'fn'", "KeyError", "bad.py:2"),
        reward_file("return {}['a']"),
    ),
    "reward that raises, rejection sampling": Case(
        f"{RS} --reward bad.py:fn", ("round 1", "'fn'", "KeyError"), reward_file("return {}['a']")
    ),
    "reward of a wrong count": Case(
        f"{GRPO} --prompts p.jsonl --reward bad.py:fn",
        ("step 1", "'fn'", "1 values for 4"),
        reward_file("return [1.0]"),
    ),
    "reward that is NaN": Case(
        f"{PPO} --reward bad.py:fn", ("ppo step 1", "'fn'", "nan"), reward_file("return [float('nan')] * len(prompts)")
    ),
    "reward that is text": Case(
        f"{PPO} --reward bad.py:fn", ("step 1", "'fn'", "number"), reward_file("return ['good'] * len(prompts)")
    ),
    "no reward": Case(f"{GRPO} --prompts p.jsonl --reward", ("reward must hold one", "reward-model directory")),
    "unknown reward": Case(f"{GRPO} --prompts p.jsonl --reward nope", ("nope", "length", "sentiment")),
    "unknown rule": Case(f"{GRPO} --prompts p.jsonl --reward lenght:3", ("lenght:3",)),
    "missing reward file": Case(f"{GRPO} --prompts p.jsonl --reward no.py:fn", ("no.py", "no such file")),
    "missing reward function": Case(f"{GRPO} --prompts p.jsonl --reward r.py:g", ("'g'", "fn")),
    "reward file with an error": Case(
        f"{GRPO} --prompts p.jsonl --reward bad.py:fn", ("bad.py", "SyntaxError"), ("bad.py", "def fn(:\n")
    ),
    "policy for a reward model": Case(f"{GRPO} --prompts p.jsonl --reward {{tiny}}", ("not a reward model",)),
    "weight that is no number": Case(f"{GRPO} --prompts p.jsonl --reward r.py:fn=nan", ("r.py:fn=nan", "finite")),
    "the same reward twice": Case(f"{TASK} --reward r.py:fn", ("'r.py:fn'", "two rewards", "NAME:=")),
    # numbers
    "N < K": Case(f"{RS} --reward r.py:fn --group-size 2 --top-k 3", ("group_size 2", "top_k 3")),
    "G < 2 in grpo": Case(f"{TASK} --group-size 1", ("group_size", "at least 2")),
    "more minibatches than completions": Case(f"{TASK} --minibatches 5", ("minibatches is 5", "4 completions")),
    "more minibatches than completions in ppo": Case(
        f"{PPO} --reward r.py:fn --minibatches 3", ("minibatches is 3", "2 completions")
    ),
    "negative": Case(f"{TASK} --learning-rate -1", ("learning_rate must be positive",)),
    "negative coefficient": Case(f"{TASK} --kl-coef -0.1", ("kl_coef must be 0 or more",)),
    "NaN": Case(f"{TASK} --kl-coef nan", ("--kl-coef", "finite", "nan")),
    "infinite": Case(f"{TASK} --learning-rate inf", ("--learning-rate", "finite")),
    "not a number": Case(f"{TASK} --kl-coef much", ("--kl-coef", "number", "much")),
    "not a whole number": Case(f"{TASK} --steps 1.5", ("--steps", "integer", "1.5")),
    "no steps": Case(f"{TASK} --steps 0", ("steps must be at least 1",)),
    "not a choice": Case(f"{TASK} --kl-estimator k4", ("--kl-estimator", "'k3_corrected'", "'k4'")),
    "temperature 0": Case(f"{TASK} --temperature 0", ("temperature must be above 0",)),
    # command lines
    "unknown command": Case("gpro", ("'gpro'", "did you mean grpo?", "tether --help")),
    "unknown flag": Case(f"{TASK} --learning-rte 1", ("--learning-rte", "did you mean --learning-rate?")),
    "abbreviated flag": Case(f"{TASK} --temp 1", ("--temp", "did you mean --temperature?")),
    "flag without a value": Case(f"{TASK} --seed", ("--seed", "expected one argument")),
    "stray argument": Case(TASK.replace("grpo", "grpo stray", 1), ("unknown argument stray",)),
    "needed options": Case("ppo --model {tiny}", ("--prompts", "--out", "tether ppo --help")),
    "neither reward nor environment": Case(
        "ppo --model {tiny} --prompts p.jsonl --out out", ("reward must hold one, unless there is an env",)
    ),
    "eval of nothing": Case("eval --model {tiny}", ("--model, --prompts and --reward", "--reward-model and --pairs")),
    "eval of two things": Case(
        "eval --model {tiny} --prompts p.jsonl --reward r.py:fn --reward-model m --pairs pairs.jsonl", ("or",)
    ),
    "no such device": Case(f"{TASK} --device gpu", ("'gpu'", "cpu")),
    # configuration files
    "missing configuration": Case(f"{TASK} --config nope.yaml", ("nope.yaml", "cannot be read")),
    "unknown key": Case(
        f"{TASK} --config bad.yaml", ("bad.yaml", "'kl_coeff'", "did you mean kl_coef?"), ("bad.yaml", "kl_coeff: 1\n")
    ),
    "wrong type in YAML": Case(
        f"{TASK} --config bad.yaml", ("bad.yaml", "steps", "integer", "'many'"), ("bad.yaml", "steps: many\n")
    ),
    "NaN in YAML": Case(
        f"{TASK} --config bad.yaml", ("bad.yaml", "kl_coef", "finite"), ("bad.yaml", "kl_coef: .nan\n")
    ),
    "malformed YAML": Case(f"{TASK} --config bad.yaml", ("bad.yaml:2", "YAML"), ("bad.yaml", "a: 1\n]\n")),
    "YAML that holds no options": Case(f"{TASK} --config bad.yaml", ("bad.yaml", "name: value"), ("bad.yaml", "- a\n")),
    "configuration of another command": Case(
        f"{TASK} --config bad.yaml", ("bad.yaml", "tether ppo", "tether grpo"), ("bad.yaml", "command: ppo\n")
    ),
    # output
    "a run is there": Case(TASK, ("out", "already holds a run", "--overwrite"), prepare=a_run),
    "something else is there": Case(f"{TASK} --overwrite", ("out", "not a run"), prepare=not_a_run),
    "output is a file": Case(f"{TASK} --out p.jsonl", ("p.jsonl", "is a file")),
    "output below a file": Case(f"{TASK} --out p.jsonl/run", ("p.jsonl", "is a file")),
    "output of generate is a directory": Case(
        "generate --model {tiny} --prompts p.jsonl --out {tiny}", ("is a directory", "--out")
    ),
    "output of generate is nowhere": Case("generate --model {tiny} --prompts p.jsonl --out no/c.jsonl", ("no",)),
    "report of no run": Case("report nope", ("nope", "not a run")),
    "report of another directory": Case("report out", ("out", "not a run"), prepare=not_a_run),
    "report of a torn run": Case(
        "report out", ("metrics.jsonl:2", "JSON"), ("out/metrics.jsonl", '{"a": 1}\n{"a'), a_run
    ),
}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, tiny):
    """The tiny model with another vocabulary."""
    directory = tmp_path_factory.mktemp("stranger") / "m"
    shutil.copytree(tiny, directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 260
    file.write_text(json.dumps(content))
    return str(directory)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_is_refused_in_one_line_and_leaves_nothing(case, here, tiny, stranger, capfd):
    if case.prepare:
        case.prepare(here, tiny)
    if case.file:
        (here / case.file[0]).write_text(case.file[1])
    before = contents(here)
    assert tether(case.line.format(tiny=tiny, stranger=stranger)) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (complaint,) = [line for line in printed.err.splitlines() if not line.startswith("memory: ")]
    assert complaint.startswith(f"tether {case.line.split()[0]}: ")
    for part in case.says:
        assert part in complaint
    after = {name: data for name, data in contents(here).items() if "__pycache__" not in name}
    assert after == before


def test_no_gpu_where_there_is_none(here, tiny, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tether(TASK.format(tiny=tiny), "--device", "cuda") == 2
    assert "'cuda' is not available here" in capfd.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    "line", [f"{TASK} --model nobody/nothing", f"{GRPO} --prompts nobody/nothing --reward r.py:fn"]
)
def test_a_hub_id_without_a_network(line, here, tiny, capfd, monkeypatch):
    """The client is held to its cache, as it is where the hub's name does not resolve."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert tether(line.format(tiny=tiny)) == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert "nobody/nothing" in complaint
    assert not (here / "out").exists()


def test_a_start_that_failed_is_not_in_the_way(here, tiny, capfd):
    """A reward that fails at the first step leaves no directory behind that would refuse the next try."""
    (here / "bad.py").write_text("def fn(**_):\n    raise OSError('no such table')\n")
    assert tether(GRPO.format(tiny=tiny), "--prompts", "p.jsonl", "--reward", "bad.py:fn") == 2
    assert "OSError: no such table" in capfd.readouterr().err
    assert tether(TASK.format(tiny=tiny)) == 0


def test_what_was_to_be_replaced_outlives_a_start_that_fails(here, tiny):
    assert tether(TASK.format(tiny=tiny)) == 0
    before = contents(here / "out")
    (here / "bad.py").write_text("def fn(**_):\n    raise OSError\n")
    failing = (*GRPO.format(tiny=tiny).split(), "--prompts", "p.jsonl", "--overwrite", "--reward")
    assert tether(" ".join(failing), "bad.py:fn") == 2
    assert contents(here / "out") == before
    assert tether(TASK.format(tiny=tiny), "--overwrite", "--steps", 1, "--keep-checkpoints") == 0
    assert len(read_rows(here / "out" / "metrics.jsonl")) == 1  # all of it is new
    assert sorted(p.name for p in (here / "out" / "checkpoints").iterdir()) == ["step_000001"]


def test_a_reward_that_fails_later_leaves_the_steps_before(here, tiny, capfd):
    (here / "bad.py").write_text(
        "calls = []\n"
        "def fn(completions, **_):\n"
        "    calls.append(1)\n"
        "    return [1.0 / (3 - len(calls))] * len(completions)\n"
    )
    assert tether(GRPO.format(tiny=tiny), "--prompts", "p.jsonl", "--reward", "bad.py:fn", "--steps", 4) == 2
    complaint = capfd.readouterr().err.splitlines()[-1]
    assert "grpo step 3: reward 'fn' raised ZeroDivisionError" in complaint
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2]


def test_more_prompts_a_step_than_there_are_go_round_again(here, tiny):
    assert tether(TASK.format(tiny=tiny), "--prompts-per-step", 7, "--steps", 1) == 0
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(here / "out" / "rollouts" / "step_000001.parquet").to_pylist()
    assert len(rows) == 7 * 2
    assert len({row["prompt"] for row in rows}) == 5


def test_overlong_rows_are_dropped_on_request(here, tiny, capfd):
    write_rows(here / "long.jsonl", [{"prompt": "a" * 200}, {"prompt": "a"}])
    line = f"generate --model {tiny} --prompts long.jsonl --max-new-tokens 2 --overlong drop --out c.jsonl"
    assert tether(line) == 0
    assert [row["prompt"] for row in read_rows(here / "c.jsonl")] == ["a"]


def test_the_complaint_is_one_line_whatever_the_error_holds(here, capfd):
    (here / "bad.py").write_text("raise ValueError('one\\ntwo\\n\\nthree')\n")
    model = make_model(here / "m")
    assert tether(f"grpo --model {model} --prompts p.jsonl --reward bad.py:fn --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert "one two three" in complaint


KEEP = "sft --model {tiny} --data texts.jsonl --batch-size 4 --epochs 1 --out out --quiet --save-every 1"


@pytest.mark.parametrize("metric", ["eval/acuracy", "-los", "eval/loss", "=loss"])
def test_a_metric_that_the_run_does_not_have_cannot_be_the_best(metric, here, tiny, capfd):
    """``eval/loss`` is one where there is held-out data."""
    assert tether(KEEP.format(tiny=tiny), f"--keep-best={metric}") == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "--keep-best: the run has no metric" in said
    assert not (here / "out").exists()


@pytest.mark.parametrize("metric", ["-loss", "grad_norm", "eval/loss", "memory/peak_gib"])
def test_a_metric_of_some_steps_can_be_the_best(metric, here, tiny):
    line = f"{KEEP.format(tiny=tiny)} --eval-data held_texts.jsonl"
    assert tether(line, f"--keep-best={metric}") == 0


def test_a_reward_that_does_not_apply_yet_can_be_the_best(here, tiny):
    (here / "seldom.py").write_text("def fn(completions, **_):\n    return [None] * len(completions)\n")
    line = f"{TASK} --steps 1 --reward seldom.py:fn --save-every 1".format(tiny=tiny)
    assert tether(line, "--keep-best", "rewards/fn/mean", "--reward", "other:=r.py:fn") == 2  # two rewards named fn
    assert (
        tether(f"{line} --reward length:3".replace("r.py:fn ", "rr:=r.py:fn "), "--keep-best", "rewards/fn/mean") == 0
    )


@pytest.mark.parametrize(
    "line", ["kl_coef: on", "kl_coef: true", "steps: yes", "seed: no", "model: on", "prompts: off", "reward: [on]"]
)
def test_a_yes_or_no_is_no_number_and_no_text(line, here, tiny, capfd):
    (here / "c.yaml").write_text(f"{line}\n")
    assert tether(TASK.format(tiny=tiny), "--config", "c.yaml") == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert f"c.yaml: {line.split(':')[0]}" in said
    assert "True" in said or "False" in said
    assert not (here / "out").exists()


def test_a_yes_or_no_is_one_where_it_belongs(here, tiny):
    (here / "c.yaml").write_text("quiet: on\noverwrite: no\nkl_coef: 1e-1\nsteps: 1\n")
    assert tether(TASK.format(tiny=tiny).replace("--steps 2 ", ""), "--config", "c.yaml") == 0


@pytest.mark.parametrize("line", [TASK, f"{RS} --reward r.py:fn", f"{PPO} --reward r.py:fn"])
def test_completions_that_fill_the_context_leave_no_room(line, here, tiny, capfd):
    assert tether(line.format(tiny=tiny), "--max-new-tokens", 128) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "--max-new-tokens less than 128" in said
    assert not (here / "out").exists()
