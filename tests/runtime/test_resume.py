"""A run that was interrupted goes on with the same numbers, and says so where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from commandline import read_rows, tether, workspace, write_rows
from tether.algorithms import optimise, sft
from tether.models.loading import load_policy
from tether.runtime.checkpoint import Checkpoints, Kept, Place
from tether.runtime.directory import read_metrics
from tether.runtime.loops import TIMINGS
from tether.runtime.state import Snapshot, restore

TASK = "--prompts p.jsonl --reward r.py:fn --prompts-per-step 2 --max-new-tokens 5"
LINES = {
    "sft": "sft --data texts.jsonl --eval-data held_texts.jsonl --batch-size 2 --epochs 2",
    "reward": "reward --pairs pairs.jsonl --batch-size 4 --epochs 2 --evals-per-epoch 2 --patience 0",
    "rejection-sampling": "rejection-sampling --prompts p.jsonl --reward r.py:fn --samples-per-prompt 3 --rounds 2 "
    "--batch-size 2 --epochs 2 --max-new-tokens 5",
    "ppo": f"ppo {TASK} --group-size 2 --minibatches 2 --kl-target 0.1 --steps 5 --critic-trunk",
    "grpo": f"grpo {TASK} --group-size 3 --minibatches 2 --epochs-per-step 2 --refills 1 --steps 5",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture
def stop_at(monkeypatch):
    """Ask the process to stop at the n-th optimiser step, by a signal as a scheduler would send it."""

    def at(n, *, number=signal.SIGTERM):
        step, calls = optimise.optimiser_step, []

        def stopping(*arguments, **options):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return step(*arguments, **options)

        monkeypatch.setattr(optimise, "optimiser_step", stopping)

    return at


def untimed(rows):
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


def result(path):
    """All that a run leaves which does not depend on the hour."""
    found = {name: untimed(read_rows(path / name)) for name in ("metrics.jsonl", "sft.jsonl") if (path / name).exists()}
    if (path / "selected.jsonl").exists():
        found["selected"] = read_rows(path / "selected.jsonl")
    found["rollouts"] = [
        pyarrow.parquet.read_table(file).to_pylist() for file in sorted((path / "rollouts").glob("*.parquet"))
    ]
    summary = json.loads((path / "summary.json").read_text())
    summary.pop("seconds")
    found["summary"] = {**summary, "last": untimed([summary["last"]]) if "last" in summary else None}
    return found


def differences(one, other, at=""):
    """Where two nested results differ, so that a failure can be read."""
    if type(one) is not type(other) or (isinstance(one, list | dict) and len(one) != len(other)):
        return [(at, one, other)]
    if isinstance(one, dict):
        return [found for name in one for found in differences(one[name], other.get(name), f"{at}/{name}")]
    if isinstance(one, list):
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{at}/{i}")
        ]
    return [] if one == other else [(at, one, other)]


def assert_same_run(one, other):
    assert differences(result(one), result(other)) == []
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def optimiser_steps(path):
    rows = read_rows(path / "sft.jsonl") if (path / "sft.jsonl").exists() else read_rows(path / "metrics.jsonl")
    return int(sum(row.get("optimiser_steps", 1) for row in rows))


@pytest.mark.parametrize("name", LINES)
def test_a_signal_within_a_step_is_75_and_the_run_goes_on_as_if_nothing_had_happened(name, here, tiny, stop_at, capfd):
    line = f"{LINES[name]} --quiet --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    steps = {"grpo": 20, "ppo": 20}.get(name) or optimiser_steps(here / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(steps // 2 + 1)
        assert tether(f"{line} --out cut") == 75
        assert "stopped by SIGTERM" in capfd.readouterr().err
        assert not (here / "cut" / "summary.json").exists()
        patch.undo()
        stop_at(3, number=signal.SIGINT)  # and once more, soon after
        assert tether("resume cut") == 75
    stop_at(10**9)
    assert tether("resume cut") == 0
    assert_same_run(here / "whole", here / "cut")
    assert not list((here / "cut").rglob(".*"))
    assert not [path for path in (here / "cut" / "checkpoints").iterdir() if "." in path.name]
    assert tether("resume cut") == 0
    assert "finished" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16",  # whose optimiser moves float32 masters
        "--products bfloat16 --checkpoint-activations",  # whose layers keep rounded copies of their weights
        "--top-k-tokens 20 --target-kl 0.001 --epochs-per-step 3 --whiten-rewards",
    ],
)
def test_other_kinds_of_weights_and_updates_go_on_as_well(options, here, tiny, stop_at):
    line = f"{LINES['ppo']} {options} --quiet --save-every 2 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    stop_at(6)
    assert tether(f"{line} --out cut") == 75
    assert tether("resume cut") == 0
    assert_same_run(here / "whole", here / "cut")


@pytest.mark.parametrize("name", LINES)
def test_the_same_seed_gives_the_same_numbers_however_often_it_saves(name, here, tiny):
    budget = "" if name in ("sft", "reward") else "--max-rows 3"
    assert tether(f"{LINES[name]} --quiet --save-every 0 --model {tiny} --out one") == 0
    assert tether(f"{LINES[name]} --quiet --save-every 1 --model {tiny} --out other {budget}") == 0
    one, other = result(here / "one"), result(here / "other")
    for rows in (one, other):  # of the engine's places, which --max-rows decides
        for row in [*rows["metrics.jsonl"], *rows["summary"]["last"]] if rows["summary"]["last"] else []:
            for figure in ("sampling/slot_occupancy", "sampling/cache_gib"):
                row.pop(figure, None)
    assert differences(one, other) == []
    weights, others = (load_file(here / path / "model" / "model.safetensors") for path in ("one", "other"))
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())


@pytest.mark.parametrize("name", ["ppo", "grpo", "rejection-sampling"])
def test_the_first_step_goes_on_with_what_it_has_sampled(name, here, tiny, stop_at):
    """Its weights have moved, so sampling again would give something else."""
    line = f"{LINES[name]} --quiet --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    stop_at(2)
    assert tether(f"{line} --out cut") == 75
    assert [path.name for path in (here / "cut" / "checkpoints").iterdir()] == ["step_000000.01"]
    assert tether("resume cut") == 0
    assert_same_run(here / "whole", here / "cut")


def test_rollouts_that_were_paid_for_are_not_sampled_or_scored_again(here, tiny, stop_at, capfd):
    (here / "counted.py").write_text(
        "def fn(completions, **_):\n"
        "    with open('calls', 'a') as calls:\n"
        "        calls.write('x')\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )
    line = LINES["grpo"].replace("r.py", "counted.py").replace("--refills 1", "")
    stop_at(4 * 3 + 2)  # in the fourth step
    assert tether(f"{line} --quiet --save-every 0 --out cut --model {tiny}") == 75
    assert (here / "calls").read_text() == "x" * 4
    assert tether("resume cut") == 0
    assert (here / "calls").read_text() == "x" * 5


def test_a_run_without_a_checkpoint_begins_again_with_what_it_has_paid_for(here, tiny, monkeypatch):
    line = f"{LINES['ppo']} --quiet --save-every 0 --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    shutil.copytree(here / "whole", here / "cut")
    for name in ("checkpoints", "model", "summary.json"):
        target = here / "cut" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert tether("resume cut") == 0
    assert_same_run(here / "whole", here / "cut")


@pytest.fixture
def half(here, tiny, stop_at):
    """A run that was stopped in its sixth step, with checkpoints of its third, fourth and fifth."""
    stop_at(11)
    line = f"ppo {TASK} --quiet --steps 8 --save-every 1 --keep-last 3 --model {tiny}"
    assert tether(f"{line} --out half") == 75
    return here / "half"


def test_a_corrupt_checkpoint_is_named_and_passed_over(half, here, tiny, capfd):
    names = sorted(path.name for path in (half / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000005", "step_000005.01"]
    newest, before = (Path("half/checkpoints") / name for name in reversed(names[1:]))
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
    assert "going on from step 4" in said
    assert [row["step"] for row in read_metrics(half)] == list(range(1, 9))
    assert tether(f"ppo {TASK} --quiet --steps 8 --save-every 1 --out whole --model {tiny}") == 0
    assert_same_run(half, here / "whole")


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("--steps 9", "steps (8 -> 9); go on with the new ones by --allow"),
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


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_what_is_no_run_cannot_be_resumed(where, here, capfd):
    assert tether(f"resume {where}") == 2
    assert "no run to resume" in capfd.readouterr().err


def test_two_runs_in_one_directory(half, here, tiny, capfd):
    from tether.runtime.lock import Lock

    lock = Lock(half)
    assert tether("resume half") == 2
    assert f"process {os.getpid()} is at work here" in capfd.readouterr().err
    assert tether(f"ppo {TASK} --quiet --steps 1 --overwrite --out half --model {tiny}") == 2
    assert f"process {os.getpid()} is at work here" in capfd.readouterr().err
    lock.release()
    assert tether("resume half") == 0


def test_a_time_limit_stops_and_resumes(here, tiny, capfd):
    (here / "slow.py").write_text(
        "import time\n"
        "def fn(completions, **_):\n"
        "    time.sleep(0.2)\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )
    line = LINES["ppo"].replace("r.py", "slow.py")
    assert tether(f"{line} --quiet --stop-after 0.5s --out cut --model {tiny}") == 75
    assert "stopped by its time limit" in capfd.readouterr().err
    assert tether("resume cut --stop-after 1h") == 0
    assert tether(f"{LINES['ppo']} --quiet --out whole --model {tiny}") == 0
    assert_same_run(here / "whole", here / "cut")


def test_a_signal_during_the_reward_takes_effect_at_once(here, tiny, capfd):
    (here / "hung.py").write_text("import time\ndef fn(completions, **_):\n    time.sleep(60)\n")
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert tether(f"{LINES['grpo'].replace('r.py', 'hung.py')} --quiet --out cut --model {tiny}") == 75
    assert "stopped by SIGTERM in step 1" in capfd.readouterr().err


def test_the_best_checkpoint_is_kept(here, tiny):
    line = f"ppo {TASK} --quiet --steps 6 --save-every 1 --keep-last 1 --keep-best=-step --out out --model {tiny}"
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
    checkpoints.save(state, Place(step=1, sizes={}, config={}, seconds=0.0), within_step=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state.step = 7
    may_write.set()
    checkpoints.close()
    found, _ = checkpoints.newest()
    restore(state, found.path)
    assert state.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
