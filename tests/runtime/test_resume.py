"""An interrupted run resumes with the numbers of an uninterrupted one, or says why it cannot."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commandline import numbers, read_rows, tether, workspace, write_rows
from runs import HELD_OUT, LINES, SAMPLED
from tether.algorithms import sft
from tether.models.loading import load_policy
from tether.runtime.checkpoint import Checkpoints, Kept, RunPosition
from tether.runtime.directory import read_metrics
from tether.runtime.state import RunState, Snapshot, restore

TASK = f"{SAMPLED} --prompts-per-step 2 --max-new-tokens 5"
LONGER = {
    "sft": f"{LINES['sft']} --eval-data held_texts.jsonl",
    "reward": f"{LINES['reward']} --batch-size 4 --epochs 2 --evals-per-epoch 2 --patience 0",
    "dpo": f"{LINES['dpo']} --batch-size 4 --evals-per-epoch 2 {HELD_OUT} --eval-reward length:3 --max-new-tokens 4",
    "rejection-sampling": f"{LINES['rejection-sampling']} --rounds 2 --epochs 2",
    "ppo": f"{LINES['ppo']} --adaptive-kl-target 0.1 --critic-trunk --mismatch tis",
    "grpo": f"{LINES['grpo']} --group-size 3 --dynamic-sampling 1 --entropy-target 9",
}
"""With all that a state may hold."""
LONGER |= {f"{name}, an adapter": f"{line} --lora-rank 2" for name, line in LONGER.items()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture
def stop_at():
    """Send the process a signal before the n-th optimizer step from now, as a scheduler would."""
    hooks = []

    def at(n, *, number=signal.SIGTERM):
        calls = []

        def stopping(*_):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), number)

        while hooks:
            hooks.pop().remove()
        hooks.append(register_optimizer_step_pre_hook(stopping))

    yield at
    for hook in hooks:
        hook.remove()


def optimizer_steps(path):
    rows = read_rows(path / "sft.jsonl") if (path / "sft.jsonl").exists() else read_rows(path / "metrics.jsonl")
    return int(sum(row.get("optimizer_steps", 1) for row in rows))


@pytest.mark.parametrize("name", LONGER)
def test_a_signal_within_a_step_exits_with_75_and_the_resumed_run_is_an_uninterrupted_one(
    name, here, tiny, stop_at, capfd
):
    line = f"{LONGER[name]} --quiet --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    steps = {"grpo": 16, "ppo": 16}.get(name) or optimizer_steps(here / "whole")
    stop_at(steps // 2 + 1)
    assert tether(f"{line} --out cut") == 75
    assert "stopped by SIGTERM" in capfd.readouterr().err
    assert not (here / "cut" / "summary.json").exists()
    stop_at(3, number=signal.SIGINT)  # and once more, soon after
    assert tether("resume cut") == 75
    stop_at(10**9)
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")
    assert not list((here / "cut").rglob(".*"))
    assert not (here / "cut" / "checkpoints").exists()
    assert tether("resume cut") == 0
    assert "finished" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16",  # whose optimizer moves float32 masters
        "--matmul-dtype bfloat16 --checkpoint-activations",  # whose layers keep rounded copies of their weights
        "--top-k-tokens 20 --allow-truncated-sampling --target-kl 0.001 --epochs-per-step 3 --whiten-rewards",
    ],
)
def test_other_kinds_of_weights_and_updates_resume_too(options, here, tiny, stop_at):
    line = f"{LONGER['ppo']} {options} --quiet --save-every 2 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    stop_at(6)
    assert tether(f"{line} --out cut") == 75
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


@pytest.mark.parametrize("name", LONGER)
def test_the_same_seed_gives_the_same_numbers_however_often_it_saves(name, here, tiny):
    budget = "" if name.startswith(("sft", "reward", "dpo")) else "--max-rows 3"
    assert tether(f"{LONGER[name]} --quiet --save-every 0 --model {tiny} --out one") == 0
    assert tether(f"{LONGER[name]} --quiet --save-every 1 --model {tiny} --out other {budget}") == 0
    slots = ("sampling/slot_occupancy", "sampling/cache_gib")  # of the engine, which --max-rows decides
    assert numbers(here / "one", without=slots) == numbers(here / "other", without=slots)


@pytest.mark.parametrize("name", ["ppo", "grpo", "rejection-sampling"])
def test_the_first_step_resumes_with_what_it_has_sampled(name, here, tiny, stop_at):
    """Its weights have moved, so sampling again would give something else."""
    line = f"{LONGER[name]} --quiet --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    stop_at(2)
    assert tether(f"{line} --out cut") == 75
    assert [path.name for path in (here / "cut" / "checkpoints").iterdir()] == ["step_000000.01"]
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


def test_rollouts_that_were_paid_for_are_not_sampled_or_scored_again(here, tiny, stop_at, capfd):
    (here / "counted.py").write_text(
        "def fn(completions, **_):\n"
        "    with open('calls', 'a') as calls:\n"
        "        calls.write('x')\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )
    line = LONGER["grpo"].replace("r.py", "counted.py").replace("--dynamic-sampling 1", "--steps 5")
    stop_at(4 * 3 + 2)  # in the fourth step
    assert tether(f"{line} --quiet --save-every 0 --out cut --model {tiny}") == 75
    assert (here / "calls").read_text() == "x" * 4
    assert tether("resume cut") == 0
    assert (here / "calls").read_text() == "x" * 5


def test_a_run_without_a_checkpoint_starts_again_with_the_same_numbers(here, tiny, monkeypatch):
    line = f"{LONGER['ppo']} --quiet --save-every 0 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    shutil.copytree(here / "whole", here / "cut")
    shutil.rmtree(here / "cut" / "model")
    (here / "cut" / "summary.json").unlink()
    assert tether("resume cut") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


@pytest.fixture
def half(here, tiny, stop_at):
    """A run that was stopped in its sixth step, with checkpoints of its third, fourth and fifth."""
    stop_at(11)
    line = f"ppo {TASK} --quiet --steps 8 --save-every 1 --keep-last 3 --model {tiny}"
    assert tether(f"{line} --out half") == 75
    return here / "half"


def test_a_corrupt_checkpoint_is_named_and_passed_over(half, here, tiny, capfd):
    names = sorted(path.name for path in (half / "checkpoints").iterdir())
    assert names == ["step_000003", "step_000004", "step_000005", "step_000005.01"]
    newest, before = (Path("half/checkpoints") / name for name in reversed(names[-2:]))
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    (before / "model" / "model.safetensors").unlink()
    assert tether("resume half") == 0
    said = capfd.readouterr().err
    assert f"{newest}: corrupt: tensors.safetensors is not as it was written; it is passed over" in " ".join(
        said.split()
    )
    assert f"{before}: corrupt: model/model.safetensors is missing" in " ".join(said.split())
    assert "resuming from step 4" in said
    assert [row["step"] for row in read_metrics(half)] == list(range(1, 9))
    assert tether(f"ppo {TASK} --quiet --steps 8 --save-every 1 --out whole --model {tiny}") == 0
    assert numbers(here / "whole") == numbers(half)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("--steps 9", "steps (8 -> 9); resume with the new ones by --allow"),
        ("--kl-coef 0.5 --allow", "kl_coef (0.05 -> 0.5); kl_coef cannot change in a run"),
        ("--seed 3 --steps 9 --allow", "seed (0 -> 3); seed cannot change in a run"),
        ("--nonsense 3", "unknown option --nonsense"),
    ],
)
def test_other_options_are_named_and_refused(half, more, complaint, capfd):
    before = (half / "config.yaml").read_bytes(), (half / "metrics.jsonl").read_bytes()
    assert tether(f"resume half {more}") == 2
    assert complaint in capfd.readouterr().err.splitlines()[-1]
    assert before == ((half / "config.yaml").read_bytes(), (half / "metrics.jsonl").read_bytes())


def test_a_configuration_that_was_edited_is_noticed(half, capfd):
    config = half / "config.yaml"
    config.write_text(config.read_text().replace("gamma: 1.0", "gamma: 0.9"))
    assert tether("resume half") == 2
    assert "gamma (1.0 -> 0.9)" in capfd.readouterr().err.splitlines()[-1]


def test_what_was_allowed_once_stays_allowed(half, stop_at):
    stop_at(1)
    assert tether("resume half --steps 9 --save-every 0 --allow") == 75
    stop_at(1)
    assert tether("resume half") == 75
    stop_at(10**9)
    assert tether("resume half") == 0
    assert len(read_metrics(half)) == 9


def test_more_steps_by_allow(half):
    assert tether("resume half --steps 9 --allow") == 0
    assert [row["step"] for row in read_metrics(half)] == list(range(1, 10))
    assert "steps: 9" in (half / "config.yaml").read_text()
    assert tether("resume half") == 0


def test_data_that_changed_is_refused(half, here, capfd):
    rows = read_rows(here / "p.jsonl")
    write_rows(here / "p.jsonl", [{**rows[0], "answer": "another"}, *rows[1:]])
    assert tether("resume half") == 2
    assert "prompts is not what it was when the run began" in capfd.readouterr().err.splitlines()[-1]
    write_rows(here / "p.jsonl", rows)
    assert tether("resume half") == 0


def test_a_model_that_changed_is_refused(half, tiny_models, here, capfd):
    config = half / "config.yaml"
    tiny = next(line for line in config.read_text().splitlines() if line.startswith("model: "))
    config.write_text(config.read_text().replace(tiny, f"model: {tiny_models['qwen2']}"))
    assert tether("resume half") == 2
    assert "model" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("where", "complaint"), [("nowhere", "no such directory"), (".", "no run to resume")])
def test_what_is_no_run_cannot_be_resumed(where, complaint, here, capfd):
    assert tether(f"resume {where}") == 2
    assert complaint in capfd.readouterr().err


@pytest.mark.parametrize(("line", "found"), [("", 1), ("format: 2\n", 2), ("format: 4\n", 4)])
def test_a_run_of_another_version_is_refused(line, found, half, capfd):
    config = half / "config.yaml"
    config.write_text(config.read_text().replace("format: 3\n", line))
    assert tether("resume half") == 2
    (said,) = capfd.readouterr().err.splitlines()[-1:]
    assert said == (
        f"tether resume: half: made by another version of tether (format {found}; this one resumes format 3); "
        "begin a new run"
    )


def test_two_runs_in_one_directory(half, here, tiny, capfd):
    from tether.runtime.lock import Lock

    lock = Lock(half)
    assert tether("resume half") == 2
    assert f"in use by process {os.getpid()}" in capfd.readouterr().err
    assert tether(f"ppo {TASK} --quiet --steps 1 --overwrite --out half --model {tiny}") == 2
    assert f"in use by process {os.getpid()}" in capfd.readouterr().err
    lock.release()
    assert tether("resume half") == 0


def test_a_time_limit_stops_and_resumes(here, tiny, capfd):
    (here / "slow.py").write_text(
        "import time\n"
        "def fn(completions, **_):\n"
        "    time.sleep(0.2)\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )
    line = LONGER["ppo"].replace("r.py", "slow.py")
    assert tether(f"{line} --quiet --stop-after 0.5s --out cut --model {tiny}") == 75
    assert "stopped by its time limit" in capfd.readouterr().err
    assert tether("resume cut --stop-after 1h") == 0
    assert tether(f"{LONGER['ppo']} --quiet --out whole --model {tiny}") == 0
    assert numbers(here / "cut") == numbers(here / "whole")


def test_a_signal_during_the_reward_takes_effect_at_once(here, tiny, capfd):
    (here / "hung.py").write_text("import time\ndef fn(completions, **_):\n    time.sleep(60)\n")
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert tether(f"{LONGER['grpo'].replace('r.py', 'hung.py')} --quiet --out cut --model {tiny}") == 75
    assert "stopped by SIGTERM in step 1" in capfd.readouterr().err


def test_the_best_checkpoint_is_kept(here, tiny):
    line = f"ppo {TASK} --quiet --steps 6 --save-every 1 --keep-last 1 --keep-best=-step --keep-checkpoints"
    line += f" --out out --model {tiny}"
    assert tether(line) == 0
    names = sorted(path.name for path in (here / "out" / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000006"]


def test_a_state_that_moves_on_while_it_is_written_is_saved_as_it_was(here, tiny, monkeypatch):
    """As on CUDA, where the whole of a checkpoint is written in the background."""
    model, tokenizer = load_policy(tiny)
    state = sft.State.create(model, 4, sft.Config(), seed=0)
    checkpoints = Checkpoints(here / "out", tokenizer, Kept(last=1, best=None), overlap=True)
    (here / "out").mkdir()
    may_write, write = threading.Event(), Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda *given: may_write.wait() and write(*given))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    checkpoints.save(RunState(state), RunPosition(step=1, sizes={}, config={}, seconds=0.0), within_step=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state.step = 7
    may_write.set()
    checkpoints.close()
    found, _ = checkpoints.newest()
    restore(RunState(state), found.path)
    assert state.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
