"""The documents say what the program does: commands parse, links lead somewhere, metrics and options are real."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from commandline import tether, workspace
from helpers import FunctionScorer
from tether import config
from tether.algorithms import dpo, grpo, ppo, rejection_sampling, reward_model, sft
from tether.algorithms.optimise import Optim
from tether.algorithms.surrogate import Surrogate
from tether.commands import TABLE, find
from tether.evaluation import PolicyEvaluation
from tether.flags import parse
from tether.generation.engine import Engine
from tether.looking.evaluate import Eval
from tether.looking.policy_figures import Attempts
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.models.reward import new_reward_model, save_reward_model
from tether.rewards.judge_file import JudgeFile
from tether.rewards.rules import RULES
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.directory import RunDirectory, read_metrics
from tether.runtime.journal import Journal
from tether.runtime.progress import ProgressLine
from tether.runtime.recorder import TIMINGS, Recorder
from tether.runtime.state import RunState
from tether.serve.reward_server import ServeReward
from tether.types import Budget, Demonstration, PreferencePair, Prompt, Sampling, StepResult

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALGORITHMS = {
    "sft": sft,
    "reward_model": reward_model,
    "dpo": dpo,
    "rejection_sampling": rejection_sampling,
    "ppo": ppo,
    "grpo": grpo,
}
SAMPLING = Sampling(max_new_tokens=5)
PROMPTS = [Prompt(ids=(0, 10 + i), text="p") for i in range(4)]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def names(text: str) -> set[str]:
    """What stands in backticks in the first column of the tables."""
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_every_rule_is_in_the_table():
    rows = re.findall(r"^\| `([^`]+)`", section(page("rewards"), "Rules"), re.MULTILINE)
    assert [row.partition(":")[0] for row in rows] == list(RULES)


def option_rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `--([^`]+)` \| ([^|]+) \|", text, re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        file = (path.parent / target) if target else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def commands() -> list[str]:
    blocks = [
        block for path in PAGES for block in re.findall(r"```console\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    ]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if line.startswith("tether ")})


def test_every_command_is_shown():
    shown = {shlex.split(line)[1] for line in commands()}
    assert shown >= {command.name for command in TABLE}


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    _, name, *arguments = shlex.split(line)
    command = find(name, TABLE)
    assert command is not None
    assert isinstance(parse(name, command.options_class(), arguments), command.options_class())


@pytest.mark.parametrize(("name", "algorithm"), ALGORITHMS.items(), ids=ALGORITHMS.keys())
def test_options_of_the_algorithms(name, algorithm):
    defaults = algorithm.Config()
    nested = dataclasses.asdict(defaults.sft) if name == "rejection_sampling" else {}
    own = {**nested, **vars(defaults)}
    expected = {
        field.replace("_", "-"): str(value)
        for field, value in own.items()
        if field not in ("optim", "sampling", "sft", "surrogate")
    }
    assert option_rows(section(page(f"algorithms/{name}"), "Options")) == expected


OWN_TABLES = (
    "Budget",
    "Chat",
    "DataOptions",
    "DeviceOptions",
    "EnvironmentOptions",
    "EvaluationOptions",
    "Lora",
    "RewardCalls",
)
"""Groups within groups, each with a table of its own."""


def test_common_options():
    groups = {
        "The run": config.RunOptions,
        "Adapters": config.Lora,
        "The device": config.DeviceOptions,
        "Prompts and rewards": config.PromptOptions,
        "Environments": config.EnvironmentOptions,
        "Evaluation during training": config.EvaluationOptions,
        "Calls of rewards": config.RewardCalls,
        "Rows of data": config.DataOptions,
        "Conversations": config.Chat,
        "Steps": config.Steps,
        "Sampling": Sampling,
        "The rollout's budget": Budget,
        "The policy's loss": Surrogate,
        "The optimizer": Optim,
    }
    for title, cls in groups.items():
        expected = {
            field.name.replace("_", "-"): "required" if field.default is dataclasses.MISSING else str(field.default)
            for field in dataclasses.fields(cls)
            if not str(field.type).endswith(OWN_TABLES)
        }
        assert option_rows(section(page("options"), title)) == expected


def test_options_of_rewards_that_are_elsewhere():
    text = page("remote_rewards")
    served = {name.replace("_", "-"): str(entry.default) for name, entry in fields_of(ServeReward).items()}
    assert option_rows(section(text, "Serving a reward model")) == {
        name: default for name, default in served.items() if name not in ("model", "device")
    }
    rows = re.findall(r"^\| (`[^|]+`) \|", section(text, "Judges"), re.MULTILINE)
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == fields_of(JudgeFile).keys()


def fields_of(cls) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def test_figures_of_an_evaluation():
    expected = {field.name for field in dataclasses.fields(PolicyEvaluation)}
    assert names(section(page("metrics"), "What an evaluation holds")) == expected


PHASES = {
    "sft": ("update",),
    "reward_model": ("update",),
    "dpo": ("update",),
    "rejection_sampling": ("generate", "score", "reference", "update", "eval"),
    "ppo": ("generate", "score", "reference", "advantage", "update"),
    "grpo": ("generate", "score", "reference", "advantage", "update"),
}


def phase_metrics(name: str) -> set[str]:
    """The seconds of each phase of an algorithm, and the FLOPs of each that is made of matrix products."""
    return {f"time/{phase}" for phase in PHASES[name]} | {
        f"flops/{phase}" for phase in PHASES[name] if phase in ("generate", "reference", "update")
    }


def documented(name: str, *shared: str) -> set[str]:
    own = names(section(page(f"algorithms/{name}"), "Metrics"))
    common = {metric for title in shared for metric in names(section(page("metrics"), title))}
    return own | {metric for metric in common if "NAME" not in metric} | phase_metrics(name)


def test_phases_of_a_step():
    expected = {"time/eval"}.union(*map(phase_metrics, ALGORITHMS))
    assert names(section(page("metrics"), "The phases of a step")) == expected
    for begin in TIMINGS:
        assert f"`{begin}`" in section(page("metrics"), "The phases of a step").rsplit("What depends on", 1)[1]


def test_what_the_recorder_adds_to_a_row(tmp_path):
    directory = RunDirectory(tmp_path / "run", {})
    progress = ProgressLine("ppo", 1, quiet=True)
    recorder = Recorder(
        directory=directory,
        checkpoints=Checkpoints(directory.path, None, Kept(last=1, best=None)),
        journal=Journal(directory),
        progress=progress,
        state=RunState(None),
        model=torch.nn.Module(),
        device=torch.device("cpu"),
        matrix_rate=1e9,
    )
    recorder.start()
    given = {"num_tokens": 4.0, "flops/update": 1e3, "time/update": 0.1}
    recorder.record(1, StepResult(metrics=given))
    (row,) = read_metrics(directory.path)
    assert set(row) - set(given) == names(section(page("metrics"), "Every row"))


UPDATES, SAMPLES, POLICY = "Every optimizer step", "Everything that samples", "Every policy update"


CORRECTED = Surrogate(mismatch="tis")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {"target_kl": 0.1, "surrogate": CORRECTED}),
        ("grpo", {"dynamic_sampling": 1, "surrogate": CORRECTED}),
    ],
)
def test_metrics_of_policy_training(tiny, name, options):
    algorithm = ALGORITHMS[name]
    model, tokenizer = load_policy(tiny)
    chosen = algorithm.Config(sampling=SAMPLING, group_size=2, **options)
    state = algorithm.State.create(
        model, chosen, reference=reference_of(model), prompts=len(PROMPTS), total_steps=1, seed=0
    )
    score = FunctionScorer(lambda _, completion: completion.ids[0])
    result = algorithm.step(state, PROMPTS, generator=Engine(model, tokenizer), scorer=score, config=chosen)
    assert set(result.metrics) == documented(name, UPDATES, SAMPLES, POLICY)


def test_metrics_of_rejection_sampling(tiny):
    model, tokenizer = load_policy(tiny)
    chosen = rejection_sampling.Config(group_size=2, sampling=SAMPLING)
    result = rejection_sampling.step(
        rejection_sampling.State.create(model, chosen, reference=reference_of(model), prompts=len(PROMPTS), seed=0),
        PROMPTS,
        generator=Engine(model, tokenizer),
        scorer=FunctionScorer(lambda _, completion: completion.ids[0]),
        config=chosen,
        on_step=lambda _: None,
    )
    assert set(result.metrics) == documented("rejection_sampling", SAMPLES)


def test_metrics_of_sft(tiny):
    model, _ = load_policy(tiny)
    data = [Demonstration(prompt_ids=(0, 5), completion_ids=(7, 1))]
    state = sft.State.create(model, 1, sft.Config(), seed=0)
    found = sft.step(state, data, config=sft.Config()).metrics | sft.evaluate(model, data, token_budget=64)
    assert set(found) == documented("sft", UPDATES)


def test_metrics_of_dpo(tiny):
    model, _ = load_policy(tiny)
    chosen = dpo.Config()
    pairs = dpo.refer(model, [PreferencePair(prompt_ids=(0, 5), chosen_ids=(7, 1), rejected_ids=(8, 1))])
    result = dpo.step(dpo.State.create(model, 1, chosen, seed=0), pairs, config=chosen)
    held_out = dpo.evaluate(model, pairs, config=chosen, token_budget=64)
    assert set(result.metrics | held_out) == documented("dpo", UPDATES)


def test_metrics_of_reward_models(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    pairs = [PreferencePair(prompt_ids=(0, 5), chosen_ids=(7, 1), rejected_ids=(8, 1))]
    chosen = reward_model.Config()
    result = reward_model.step(reward_model.State.create(model, 1, chosen, seed=0), pairs, config=chosen)
    held_out = reward_model.evaluate(model, pairs, token_budget=64)
    assert set(result.metrics | held_out.metrics()) == documented("reward_model", UPDATES)


def test_options_of_eval():
    own = [Eval, Attempts]
    expected = {
        field.name.replace("_", "-"): str(field.default if field.default is not dataclasses.MISSING else ())
        for cls in own
        for field in dataclasses.fields(cls)
        if field.name not in ("attempts", "calls", "samples")
    }
    assert option_rows(section(page("evaluation"), "Options")) == expected


def keys(title: str) -> set[str]:
    """What stands in backticks in the first cells of a section of the page on evaluation, which may name several."""
    cells = re.findall(r"^\| ([^|]+) \|", section(page("evaluation"), title), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_what_eval_prints(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    policy = f"eval --model {tiny} --reference {tiny} --prompts p.jsonl --reward r.py:fn --max-new-tokens 4"
    assert tether(f"{policy} --group-size 2 --pass-at 1 --majority-at 2") == 0
    assert json.loads(capsys.readouterr().out).keys() == keys("JSON of a policy")
    model, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(model, tokenizer, tmp_path / "rm", [((0, 5), (6, 1)), ((0, 7), (8, 1))])
    assert tether("eval --reward-model rm --pairs pairs.jsonl --by chosen") == 0
    assert json.loads(capsys.readouterr().out).keys() == keys("Reward models")
