"""Faults that happen: a disk that is full or read-only, rewards that fail, too little memory, broken files, numbers
that are not finite, two runs at once, signals in the middle of a checkpoint. Each is made for real as far as it can be.

After each: the exit code, one line that says what, where and how to go on, and what is on the disk. Then the fault is
taken away, ``tether resume`` goes on, and the run is bitwise the one that nothing happened to. The table for users is
``docs/faults.md``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commandline import contents, read_rows, tether, workspace, write_rows
from crash import difference
from tether import training
from tether.algorithms import grpo, optimise, ppo, rejection_sampling, reward_model, sft
from tether.errors import NotFiniteError
from tether.interruption import EXIT_CODE
from tether.models.packing import GroupLayout
from tether.runtime import journal
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.runtime.directory import RunDirectory

SAMPLED = "--prompts p.jsonl --reward mine.py:fn --max-new-tokens 5"
STEPS = f"{SAMPLED} --prompts-per-step 2 --group-size 2 --minibatches 2 --epochs-per-step 2 --steps 4"
LINES = {
    "sft": "sft --data texts.jsonl --batch-size 2 --epochs 4",
    "reward": "reward --pairs pairs.jsonl --batch-size 6 --epochs 3 --evals-per-epoch 1",
    "rejection-sampling": f"rejection-sampling {SAMPLED} --samples-per-prompt 3 --rounds 3 --batch-size 2",
    "ppo": f"ppo {STEPS}",
    "grpo": f"grpo {STEPS}",
}
ALWAYS = "--quiet --keep-last 1"
MENDED = "def fn(completions, **_):\n    return [float(len(c) % 5) for c in completions]\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that are started here, so that both compute the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


def prepare(directory: Path) -> None:
    workspace(directory)
    (directory / "mine.py").write_text(MENDED)


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory):
    """The run of a command line that nothing happens to; each is made once."""
    root, made = tmp_path_factory.mktemp("untouched"), {}
    prepare(root)

    def of(line: str) -> Path:
        if line not in made:
            made[line] = root / f"out{len(made)}"
            with contextlib.chdir(root):
                assert tether(f"{line} --model {tiny} --out {made[line].name}") == 0
        return made[line]

    return of


def last_line(capfd) -> str:
    return capfd.readouterr().err.splitlines()[-1]


def assert_intact(run: Path) -> list[str]:
    """Nothing half-written has a name, and every checkpoint is as it was written; gives the checkpoints' names."""
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    saved = Checkpoints(run, None, Kept(last=1, best=None))
    names = [path.name for *_, path in saved.names() if saved.verified(path)]
    saved.close()
    read_rows(run / "metrics.jsonl")
    return names


def assert_goes_on(run: Path, expected: Path) -> None:
    assert tether(f"resume {run}") == 0
    assert_intact(run)
    assert difference(run, expected) is None


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def disk(here):
    """A disk of its own, of 8 MB."""
    path = here / "disk"
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a disk; see test_disks_in_a_namespace")
    yield path
    while path.is_mount():
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root mounts its disks here")
def test_disks_in_a_namespace():
    """The tests of disks, as root of a namespace of one's own."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("no namespaces for users here")
    done = subprocess.run([*space, sys.executable, "-m", "pytest", "-q", __file__, "-k", "disk"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.fixture
def before(monkeypatch):
    """Do something just before the n-th call of a function, when no checkpoint is being written or removed, save the
    one that the call is a part of."""
    save, written = Checkpoints.save, []

    def noted(self, *arguments, **options):
        save(self, *arguments, **options)
        written.append(self.under_way)

    monkeypatch.setattr(Checkpoints, "save", noted)

    def at(owner, name, n, act):
        function, calls = getattr(owner, name), []

        def acting(*arguments, **options):
            calls.append(1)
            if len(calls) == n:
                if threading.current_thread() is threading.main_thread():
                    futures.wait(written)
                act()
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, acting)

    return at


def fill(disk: Path, *, spare: int = 0) -> None:
    """Leave ``spare`` bytes of the disk."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - spare)


ONE_BY_ONE = "rejection-sampling --batch-size 1 --epochs 3 --rollouts-every 0"
FULL = {
    "a checkpoint": ("grpo --save-every 1", Checkpoints, "_written", 2, 16384, "checkpoints/step_000002"),
    "a checkpoint and the journal": ("grpo --save-every 1", Checkpoints, "_written", 2, 0, "checkpoints/step_000002"),
    "a checkpoint's tokenizer": ("ppo --save-every 1", Checkpoints, "_files_of_tokenizer", 1, 8192, "checkpoints"),
    "the metrics": ("sft --epochs 10 --save-every 20", RunDirectory, "log", 24, 0, "metrics.jsonl"),
    "the rollouts": ("ppo --save-every 1", RunDirectory, "rollouts", 3, 0, "rollouts/step_000003.parquet"),
    "the journal": ("grpo --save-every 1", journal, "write_rollouts", 3, 0, "journal/step_00000"),
    "the journal's scores": ("ppo --save-every 1", journal, "write_scores", 3, 0, "journal/step_00000"),
    "fine-tuning steps": (ONE_BY_ONE, RunDirectory, "append", 18, 0, "sft.jsonl"),
    "the model": ("grpo", training, "save_model", 1, 16384, "model"),
    "the model's tokenizer": ("sft", training, "save_model", 1, 110_592, "model"),
    "the reward model": ("reward", training, "save_reward_model", 1, 16384, "model"),
    "the summary": ("sft", RunDirectory, "summary", 1, 0, "summary.json"),
}


@pytest.mark.parametrize("case", FULL.values(), ids=FULL)
def test_a_full_disk(case, disk, tiny, untouched, before, capfd):
    line, owner, name, n, spare, says = case
    command, *options = line.split()
    line = " ".join([LINES[command], *options, ALWAYS])
    before(owner, name, n, lambda: fill(disk, spare=spare))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    complaint = last_line(capfd)
    assert complaint.startswith(f"tether {command}: disk/out/{says}")
    assert "cannot be written (" in complaint
    assert "No space left on device" in complaint
    assert complaint.endswith("; go on with 'tether resume disk/out'")
    assert_intact(disk / "out")
    assert not (disk / "out" / "summary.json").exists()
    (disk / "filler").unlink()
    assert_goes_on(Path("disk/out"), untouched(line))


@pytest.mark.parametrize("spare", [0, 8192], ids=["full", "almost full"])
def test_a_disk_that_is_full_from_the_start(spare, disk, tiny, untouched, capfd):
    line = f"{LINES['ppo']} {ALWAYS}"
    fill(disk, spare=spare)
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert "disk/out" in complaint
    assert "No space left on device" in complaint
    assert "resume" not in complaint
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    assert tether(f"{line} --model {tiny} --out disk/out") == 0


def test_a_disk_that_is_still_full(disk, tiny, untouched, before, capfd):
    line = f"{LINES['ppo']} {ALWAYS} --save-every 1"
    before(RunDirectory, "log", 3, lambda: fill(disk))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    (disk / "filler").unlink()
    left = contents(disk / "out")
    fill(disk)
    assert tether("resume disk/out") == 2
    assert last_line(capfd).startswith("tether resume: disk/out")
    found = contents(disk / "out")
    assert {name: data for name, data in left.items() if name.startswith("checkpoints")} == {
        name: data for name, data in found.items() if name.startswith("checkpoints")
    }
    (disk / "filler").unlink()
    assert_goes_on(Path("disk/out"), untouched(line))


def test_a_limit_on_the_size_of_files(here, tiny, untouched, before, capfd):
    """``ulimit -f``: no file may grow past the limit. The smallest are fine, and no checkpoint is."""
    line = f"{LINES['ppo']} {ALWAYS} --save-every 2"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before(RunDirectory, "log", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (32768, limits[1])))
    try:
        assert tether(f"{line} --model {tiny} --out out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    complaint = last_line(capfd)
    assert complaint.startswith("tether ppo: out/checkpoints/step_000002: cannot be written (")
    assert "File too large" in complaint
    assert complaint.endswith("; go on with 'tether resume out'")
    assert assert_intact(here / "out") == []
    assert_goes_on(Path("out"), untouched(line))


def read_only(path: Path) -> None:
    """Lay a read-only view of the disk over it: what is open stays open, as where the kernel gives a disk up."""
    mount("--bind", path, path)
    mount("-o", "remount,bind,ro", path)


@pytest.mark.parametrize("out", ["disk/out", "disk"])
def test_a_disk_that_is_read_only_from_the_start(out, disk, tiny, capfd):
    read_only(disk)
    assert tether(f"{LINES['ppo']} {ALWAYS} --model {tiny} --out {out}") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether ppo: {out}")
    assert "written" in complaint
    assert not list(disk.iterdir())


READ_ONLY = {
    "a checkpoint": ("grpo --save-every 1", Checkpoints, "_written", 2, "checkpoints/step_000002"),
    "the metrics": ("sft --save-every 4", RunDirectory, "log", 5, "metrics.jsonl"),
    "the model": ("reward", training, "save_reward_model", 1, "model"),
}


@pytest.mark.parametrize("case", READ_ONLY.values(), ids=READ_ONLY)
def test_a_disk_that_becomes_read_only(case, disk, tiny, untouched, before, capfd):
    line, owner, name, n, says = case
    command, *options = line.split()
    line = " ".join([LINES[command], *options, ALWAYS])
    before(owner, name, n, lambda: read_only(disk))
    assert tether(f"{line} --model {tiny} --out disk/out") == 2
    complaint = last_line(capfd)
    assert complaint.startswith(f"tether {command}: disk/out/{says}")
    assert "Read-only file system" in complaint
    assert complaint.endswith("; go on with 'tether resume disk/out'")
    left = contents(disk / "out")
    assert tether("resume disk/out") == 2
    assert "Read-only file system" in last_line(capfd)
    assert contents(disk / "out") == left
    subprocess.run(["umount", disk], check=True)
    assert_goes_on(Path("disk/out"), untouched(line))


# -- rewards ---------------------------------------------------------------------------------------------------------

FAILING = {
    "raises": ("grpo", "raise KeyError('answer')", "reward 'fn' raised KeyError: 'answer' (mine.py:6)"),
    "hangs": ("ppo", "import time; time.sleep(60)", "reward 'fn' did not return within 0.5 s"),
    "gives NaN": ("grpo", "return [float('nan')] * len(completions)", "reward 'fn' returned nan for completion 0"),
    "gives None": ("ppo", "return None", "reward 'fn' must return a list of values; it returned NoneType"),
    "gives too few": ("rejection-sampling", "return [1.0]", "reward 'fn' returned 1 values for "),
}


def failing(body: str, calls: str) -> str:
    """A reward function that does ``body`` in those of its calls for which ``calls`` holds."""
    return (
        f"calls = []\n\ndef fn(completions, **_):\n    calls.append(1)\n    if len(calls) {calls}:\n        {body}\n"
        "    return [float(len(c) % 5) for c in completions]\n"
    )


@pytest.mark.parametrize(("command", "body", "says"), FAILING.values(), ids=FAILING)
def test_a_reward_function_that_fails_in_the_third_step(command, body, says, here, tiny, untouched, capfd):
    line = f"{LINES[command]} {ALWAYS} --save-every 10 --reward-deadline 0.5s"
    (here / "mine.py").write_text(failing(body, "== 3"))
    assert tether(f"{line} --model {tiny} --out out") == 2
    complaint = last_line(capfd)
    step = "round" if command == "rejection-sampling" else "step"
    assert complaint.startswith(f"tether {command}: {command} {step} 3: {says}")
    assert complaint.endswith("; go on with 'tether resume out'")
    assert assert_intact(here / "out") == ["step_000002.01"]
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2]
    (here / "mine.py").write_text(MENDED)
    assert_goes_on(Path("out"), untouched(line))


@pytest.mark.parametrize("fault", [FAILING["hangs"], FAILING["gives None"]], ids=["hangs", "gives None"])
def test_a_reward_function_that_fails_in_the_first_step_leaves_nothing(fault, here, tiny, capfd):
    _, body, says = fault
    (here / "mine.py").write_text(failing(body, "== 1"))
    assert tether(f"{LINES['ppo']} {ALWAYS} --reward-deadline 0.5s --model {tiny} --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether ppo: ppo step 1: {says}")
    assert not (here / "out").exists()


def test_a_reward_function_that_fails_twice(here, tiny, untouched, monkeypatch, capfd):
    monkeypatch.setattr("tether.rewards.supervision.FIRST_PAUSE", 0.01)
    line = f"{LINES['grpo']} {ALWAYS} --reward-retries 2"
    (here / "mine.py").write_text(failing("raise OSError('no answer')", "in (3, 4)"))
    assert tether(f"{line} --model {tiny} --out out") == 0
    first, second = capfd.readouterr().err.splitlines()
    assert "OSError: no answer" in first
    assert "try 3 of 3" in second
    assert difference(here / "out", untouched(line)) is None


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_that_really_is_short():
    """Limits on the address space, in a process of its own: a library that failed to get memory may remember that."""
    tests = Path(__file__).with_name("short_memory.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout


def assert_same_weights(run: Path, expected: Path) -> None:
    """Up to rounding."""
    found, weights = (load_file(path / "model" / "model.safetensors") for path in (run, expected))
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name


def token_budget(run: Path) -> int:
    """What fitted, by the newest checkpoint."""
    *_, newest = sorted(run.glob("checkpoints/*/state.json"))
    state = json.loads(newest.read_text())
    return state.get("tuning", state)["guard"]["token_budget"]


@contextlib.contextmanager
def crammed(most):
    """Models that raise the error of a full GPU for more tokens at a time than ``most()``."""

    def refuse(module, arguments, options):
        tokens = options["input_ids"].numel() if isinstance(options.get("layout"), GroupLayout) else 0
        if tokens > most():
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} tokens")

    with pytest.MonkeyPatch.context() as patch:
        load = training.load

        def loaded(*arguments):
            found = load(*arguments)
            found.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
            return found

        patch.setattr(training, "load", loaded)
        yield


@pytest.mark.parametrize("command", LINES)
def test_memory_that_is_short_for_every_command(command, here, tiny, untouched):
    """Here nothing is really full: the model raises torch's error where a pass has more tokens than one row."""
    line = f"{LINES[command]} {ALWAYS}"
    with crammed(lambda: 14 if command == "sft" else 22):
        assert tether(f"{line} --model {tiny} --out out") == 0
    assert token_budget(here / "out") <= 32
    assert_same_weights(here / "out", untouched(line))


@pytest.mark.parametrize("command", ["ppo", "rejection-sampling"])
def test_memory_that_runs_out_in_the_middle(command, here, tiny, untouched, capfd):
    line = f"{LINES[command]} {ALWAYS}"
    rows = here / "out" / "metrics.jsonl"
    with crammed(lambda: 0 if rows.exists() and len(read_rows(rows)) == 2 else 10**9):
        assert tether(f"{line} --model {tiny} --out out") == 2
    complaint = last_line(capfd)
    assert "out of memory, however little is computed at a time (CUDA out of memory. Tried" in complaint
    assert complaint.endswith("; go on with 'tether resume out'")
    assert assert_intact(here / "out") == ["step_000002.01"]
    assert_goes_on(Path("out"), untouched(line))


# -- files that are not what they were -------------------------------------------------------------------------------


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def no_number(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def another_vocabulary(file: Path) -> None:
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 9999
    file.write_text(json.dumps(content))


BROKEN = {
    "cut weights": ("model.safetensors", cut, "cannot be loaded"),
    "cut configuration": ("config.json", cut, "the configuration cannot be read"),
    "cut tokenizer": ("tokenizer.json", cut, "the tokenizer cannot be loaded"),
    "a weight that is no number": ("model.safetensors", no_number, "the first is model.norm.weight"),
    "another tokenizer": ("tokenizer.json", another_vocabulary, "the tokenizer does not belong to the model"),
}


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(("name", "spoil", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model(command, name, spoil, says, here, tiny, capfd):
    shutil.copytree(tiny, here / "m")
    spoil(here / "m" / name)
    assert tether(f"{LINES[command]} {ALWAYS} --model m --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith(f"tether {command}: m: ")
    assert says in complaint
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A workspace with a model, and with runs of three commands: stopped in the middle, and never stopped."""
    root = tmp_path_factory.mktemp("stopped")
    prepare(root)
    shutil.copytree(tiny, root / "m")
    step = optimise.optimiser_step
    for command in ("sft", "reward", "ppo"):
        with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
            assert tether(f"{LINES[command]} {ALWAYS} --model m --out {command}-whole") == 0
            calls: list[int] = []

            def stopping(*arguments, calls=calls, **options):
                calls.append(1)
                if len(calls) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(*arguments, **options)

            patch.setattr(optimise, "optimiser_step", stopping)
            assert tether(f"{LINES[command]} {ALWAYS} --model m --out {command}") == EXIT_CODE
    return root


def other_text(file: Path) -> None:
    write_rows(file, [{**row, "prompt": "Another"} for row in read_rows(file)])


CHANGED = {
    **{name: ("ppo", f"m/{file}", spoil, says) for name, (file, spoil, says) in BROKEN.items()},
    "demonstrations": ("sft", "texts.jsonl", other_text, "data is not what it was when the run began"),
    "pairs": ("reward", "pairs.jsonl", other_text, "pairs is not what it was when the run began"),
}


@pytest.mark.parametrize(("command", "name", "spoil", "says"), CHANGED.values(), ids=CHANGED)
def test_what_broke_while_the_run_was_stopped(command, name, spoil, says, stopped, here, capfd):
    shutil.copytree(stopped, here, dirs_exist_ok=True)
    left, fine = contents(here / command), (here / name).read_bytes()
    spoil(here / name)
    assert tether(f"resume {command}") == 2
    assert says in last_line(capfd)
    assert contents(here / command) == left
    (here / name).write_bytes(fine)
    assert_goes_on(Path(command), here / f"{command}-whole")


# -- numbers that are not finite -------------------------------------------------------------------------------------

ALGORITHMS = {"sft": sft, "reward": reward_model, "rejection-sampling": rejection_sampling, "ppo": ppo, "grpo": grpo}


@pytest.fixture
def spoiled(monkeypatch):
    """Make the gradient NaN in those backward passes, counted from 1, for which ``bad`` holds."""

    @contextlib.contextmanager
    def gradients(command, bad):
        states, passes = ALGORITHMS[command].State, []
        create = states.create

        def hook(gradient):
            passes.append(1)
            return gradient * float("nan") if bad(len(passes)) else gradient

        def hooked(*arguments, **options):
            next(arguments[0].parameters()).register_hook(hook)
            return create(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(states, "create", staticmethod(hooked))
            yield

    return gradients


@pytest.fixture
def skipped(monkeypatch):
    """Of each optimiser step that was skipped, whether weights and optimiser are as they were."""
    step, found = optimise.optimiser_step, []

    def tensors(optimiser):
        moments = [entry for state in optimiser.state.values() for entry in state.values()]
        return [tensor.clone() for group in optimiser.param_groups for tensor in group["params"]] + [
            tensor.clone() for tensor in moments
        ]

    def watched(optimiser, **options):
        before = tensors(optimiser)
        try:
            return step(optimiser, **options)
        except NotFiniteError:
            found.append(all(map(torch.equal, before, tensors(optimiser))))
            raise

    monkeypatch.setattr(optimise, "optimiser_step", watched)
    return found


MIDDLE = dict.fromkeys(LINES, 6) | {"rejection-sampling": 3}
"""An optimiser step that is not one of the run's first; of rejection sampling, the first of its second round."""


@pytest.mark.parametrize("command", LINES)
def test_one_gradient_that_is_not_finite(command, here, tiny, spoiled, skipped):
    with spoiled(command, lambda n: n == MIDDLE[command]):
        assert tether(f"{LINES[command]} {ALWAYS} --model {tiny} --out out") == 0
    assert skipped == [True]
    rows = read_rows(here / "out" / "metrics.jsonl")
    if command == "rejection-sampling":
        assert [row["sft/skipped_updates"] for row in rows] == [0, 1, 0]
        assert [row["skipped_updates"] for row in read_rows(here / "out" / "sft.jsonl")] == [0, 0, 1, 1, 0, 0]
    else:
        assert rows[0]["skipped_updates"] == 0
        assert rows[-1]["skipped_updates"] == 1


@pytest.mark.parametrize("command", LINES)
def test_gradients_that_stay_not_finite(command, here, tiny, untouched, spoiled, skipped, capfd):
    line = f"{LINES[command]} {ALWAYS} --save-every 1 --max-skipped 3"
    with spoiled(command, lambda n: n >= MIDDLE[command]):
        assert tether(f"{line} --model {tiny} --out out") == 3
    assert skipped == [True] * 3
    complaint = last_line(capfd)
    assert f"tether {command}: " in complaint
    assert "the gradient is not finite (nan)" in complaint
    assert complaint.endswith(
        "; the optimiser has skipped 3 steps in a row; the run is stopped; go on with 'tether resume out'"
    )
    assert assert_intact(here / "out")
    if command in ("ppo", "grpo"):  # all three in one step, which the checkpoint does not know
        assert_goes_on(Path("out"), untouched(line))
    else:
        assert tether("resume out") == 0


def test_a_last_gradient_that_is_not_finite(here, tiny, spoiled, skipped, capfd):
    """No step after it shows that the weights are sound, so they do not become the result."""
    with spoiled("sft", lambda n: n == 16):
        assert tether(f"{LINES['sft']} {ALWAYS} --model {tiny} --out out") == 3
    assert skipped == [True]
    assert "the run ended on 1 skipped optimiser steps" in last_line(capfd)
    assert assert_intact(here / "out") == ["step_000016"]
    assert not (here / "out" / "model").exists()
    assert tether("resume out --epochs 5 --allow") == 0


def test_a_first_gradient_that_is_not_finite_is_no_accident(here, tiny, spoiled, capfd):
    with spoiled("grpo", lambda n: n == 1):
        assert tether(f"{LINES['grpo']} {ALWAYS} --model {tiny} --out out") == 3
    assert "grpo step 1: the gradient is not finite" in last_line(capfd)
    assert not (here / "out").exists()


# -- processes -------------------------------------------------------------------------------------------------------

NURSERY = """
import json, os, sys, time
from tether import cli
from tether.runtime.state import Snapshot

cli.bodies()
for line in sys.stdin:
    order = json.loads(line)
    if pid := order.get("wait"):
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        os.chdir(order["directory"])
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        write, calls = Snapshot.write, []

        def slow(self, directory):
            write(self, directory)
            calls.append(1)
            if len(calls) >= order["from"]:
                time.sleep(order["seconds"])

        Snapshot.write = slow
        os._exit(cli.main(order["line"].split()))
"""
"""A process that has everything imported, has one thread, and forks: each fork is a tether of its own, whose
checkpoints may take their time."""


@pytest.fixture(scope="module")
def nursery():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def ask(**order) -> int:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()


def until(holds) -> None:
    """Wait, for half a minute at most."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


# -- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saving(here, tiny, nursery):
    """Start a run whose checkpoints from the second on take so many seconds, and wait until it writes that one."""

    def start(line, seconds):
        pid = nursery(directory=str(here), line=f"{line} --model {tiny} --out out", seconds=seconds, **{"from": 2})
        until(lambda: list((here / "out/checkpoints").glob(".step_000002.partial/state.json")))
        return pid

    return start


SAVES = f"{LINES['ppo']} {ALWAYS} --save-every 1"


def test_a_signal_while_a_checkpoint_is_written(here, untouched, saving, nursery):
    pid = saving(SAVES, 0.5)
    os.kill(pid, signal.SIGTERM)
    assert nursery(wait=pid) == EXIT_CODE
    assert (here / "log").read_text().endswith("go on with 'tether resume out'\n")
    (newest,) = assert_intact(here / "out")
    assert newest.startswith(("step_000002", "step_000003"))
    assert_goes_on(Path("out"), untouched(SAVES))


def test_a_second_signal_while_a_checkpoint_is_written(here, untouched, saving, nursery):
    pid = saving(SAVES, 60)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert Path(f"/proc/{pid}").exists()
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert nursery(wait=pid) == EXIT_CODE
    assert time.monotonic() - started < 2
    assert "a second signal (SIGTERM), so it ends at once" in (here / "log").read_text()
    assert [path.name for path in (here / "out/checkpoints").glob(".*.partial")] == [".step_000002.partial"]
    assert_goes_on(Path("out"), untouched(SAVES))


def test_a_kill_while_a_checkpoint_is_written(here, untouched, saving, nursery, capfd):
    pid = saving(SAVES, 60)
    os.kill(pid, signal.SIGKILL)
    assert nursery(wait=pid) == -signal.SIGKILL
    names = sorted(path.name for path in (here / "out/checkpoints").iterdir())
    assert names == [".step_000002.partial", "step_000001"]
    assert_goes_on(Path("out"), untouched(SAVES))
    assert "going on from step 1" in capfd.readouterr().err


def test_two_runs_in_one_directory(here, tiny, untouched, nursery, capfd):
    line = f"{LINES['grpo']} {ALWAYS}"
    (here / "mine.py").write_text(failing("import time; open('asleep', 'w').close(); time.sleep(60)", "== 3"))
    pid = nursery(directory=str(here), line=f"{line} --model {tiny} --out out", seconds=0, **{"from": 1})
    until((here / "asleep").exists)
    (here / "mine.py").write_text(MENDED)
    left = contents(here / "out")
    for second in ("resume out", f"{line} --overwrite --model {tiny} --out out"):
        assert tether(second) == 2
        assert f"out: process {pid} is at work here; wait until it ends, or stop it" in last_line(capfd)
    assert contents(here / "out") == left
    os.kill(pid, signal.SIGKILL)
    assert nursery(wait=pid) == -signal.SIGKILL
    assert_goes_on(Path("out"), untouched(line))
