"""Files that were damaged or changed: a run is refused, also where it would be resumed, and nothing changes on disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commandline import contents, read_rows, tether, workspace, write_rows
from faulty import ALWAYS, assert_resumes, last_line
from runs import LINES
from tether.stop_requests import EXIT_CODE


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def not_a_number(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def another_vocabulary(file: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 9999
    file.write_text(json.dumps(content))


DAMAGED = {
    "cut weights": ("model.safetensors", cut, "cannot be loaded"),
    "cut configuration": ("config.json", cut, "the configuration cannot be read"),
    "cut tokenizer": ("tokenizer.json", cut, "the tokenizer cannot be loaded"),
    "a weight that is not finite": ("model.safetensors", not_a_number, "the first is model.norm.weight"),
    "another tokenizer": ("tokenizer.json", another_vocabulary, "the tokenizer does not belong to the model"),
}


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(("name", "spoil", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_refused_before_a_run_begins(command, name, spoil, says, here, tiny, capfd):
    shutil.copytree(tiny, here / "m")
    spoil(here / "m" / name)
    assert tether(f"{LINES[command]} {ALWAYS} --model m --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether {command}: m: ")
    assert says in complaint
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A workspace with a model, and with two runs of each of three commands: one interrupted, one not."""
    root = tmp_path_factory.mktemp("stopped")
    workspace(root)
    shutil.copytree(tiny, root / "m")
    for command in ("sft", "reward", "ppo"):
        with contextlib.chdir(root):
            assert tether(f"{LINES[command]} {ALWAYS} --model m --out {command}-whole") == 0
            calls: list[int] = []

            def stop_at_the_fifth(*_, calls=calls):
                calls.append(1)
                if len(calls) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)

            hook = register_optimizer_step_pre_hook(stop_at_the_fifth)
            assert tether(f"{LINES[command]} {ALWAYS} --model m --out {command}") == EXIT_CODE
            hook.remove()
    return root


def other_text(file: Path) -> None:
    write_rows(file, [{**row, "prompt": f"Another {number}"} for number, row in enumerate(read_rows(file))])


CHANGED = {
    **{name: ("ppo", f"m/{file}", spoil, says) for name, (file, spoil, says) in DAMAGED.items()},
    "demonstrations": ("sft", "texts.jsonl", other_text, "data is not what it was when the run began"),
    "pairs": ("reward", "pairs.jsonl", other_text, "pairs is not what it was when the run began"),
}


@pytest.mark.parametrize(("command", "name", "spoil", "says"), CHANGED.values(), ids=CHANGED)
def test_files_that_change_while_a_run_is_stopped_are_refused(command, name, spoil, says, stopped, here, capfd):
    shutil.copytree(stopped, here, dirs_exist_ok=True)
    for config in here.glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(stopped), str(here)))
    left, fine = contents(here / command), (here / name).read_bytes()
    spoil(here / name)
    assert tether(f"resume {command}") == 2
    assert says in last_line(capfd)
    assert contents(here / command) == left
    (here / name).write_bytes(fine)
    assert_resumes(Path(command), here / f"{command}-whole")
