"""Rewards that touch the process: what they set stays theirs, and one file, one loop and one name serve a whole run."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from commandline import tether, workspace
from helpers import group
from tether.errors import RewardError
from tether.rewards.function import FunctionReward
from tether.rewards.loading import Sources, load_function
from tether.rewards.process import SETTINGS
from tether.rewards.resolve import resolve_scorer

GROUPS = [group([0, 5], [[6, 7, 1], [8, 1]])]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def process():
    return {name: setting.get() for name, setting in SETTINGS.items()}


def judged(reward):
    return [judgement.value for judgement in reward.judge(GROUPS)[0]]


SETS = {
    "os.chdir('elsewhere')": "float('elsewhere' in os.getcwd())",
    "torch.set_default_dtype(torch.float64)": "float(torch.zeros(1).dtype == torch.float64)",
    "torch.set_num_threads(3)": "torch.get_num_threads()",
    "torch.set_grad_enabled(False)": "float(torch.is_grad_enabled())",
    "torch.set_default_device('meta')": "float(torch.zeros(1).device.type == 'meta')",
    "torch.use_deterministic_algorithms(True, warn_only=True)": "float(torch.are_deterministic_algorithms_enabled())",
    "torch.set_float32_matmul_precision('medium')": "float(torch.get_float32_matmul_precision() == 'medium')",
    "random.seed(7)": "random.random()",
    "np.random.seed(7)": "np.random.random()",
    "torch.manual_seed(7)": "torch.rand(1, device='cpu', dtype=torch.float64).item()",
}
IMPORTS = "import os, random, torch, signal\nimport numpy as np\n"


@pytest.mark.parametrize(("sets", "reads"), SETS.items(), ids=SETS)
def test_what_a_file_sets_on_import_is_its_own(folder, sets, reads):
    (folder / "elsewhere").mkdir()
    (folder / "own.py").write_text(f"{IMPORTS}{sets}\ndef read(completions):\n    return [{reads}] * 2\n")
    before = process()
    reward = load_function("own.py:read")
    assert process() == before
    found = judged(reward)
    assert process() == before
    scope = {"os": os, "torch": torch, "random": random, "np": np}
    with FunctionReward("other", len).apart.inside():
        exec(sets, scope)
        assert found == [eval(reads, scope)] * 2
    assert process() == before


@pytest.mark.parametrize(("sets", "reads"), SETS.items(), ids=SETS)
def test_what_a_call_sets_is_its_own(folder, sets, reads):
    (folder / "elsewhere").mkdir()
    reward = load_from(folder, f"    if not os.getcwd().endswith('elsewhere'): {sets}\n    return [{reads}] * 2\n")
    before = process()
    first = judged(reward)
    assert process() == before
    assert judged(reward) == first
    assert process() == before


def load_from(folder, body):
    (folder / "called.py").write_text(f"{IMPORTS}def read(completions):\n{body}")
    return load_function("called.py:read")


def test_a_call_that_fails_leaves_nothing_behind(folder):
    (folder / "elsewhere").mkdir()
    reward = load_from(folder, "    os.chdir('elsewhere'); torch.set_default_dtype(torch.float64); 1 / 0\n")
    before = process()
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        reward.judge(GROUPS)
    assert process() == before
    (folder / "broken.py").write_text(f"{IMPORTS}os.chdir('elsewhere')\n1 / 0\n")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        load_function("broken.py:read")
    assert process() == before
    assert "broken" not in sys.modules


def test_a_generator_goes_on_where_the_file_left_it(folder):
    reward = load_from(folder, "    return [random.random(), torch.rand(1).item()]\n")
    random.seed(3)
    torch.manual_seed(3)
    expected = [[random.random(), torch.rand(1).item()] for _ in range(2)]
    random.seed(3)
    torch.manual_seed(3)
    before = process()
    assert [judged(reward) for _ in range(2)] == expected
    assert process() == before


def test_requests_to_stop_are_still_heard(folder):
    """Some libraries handle the signals that ask a run to stop from their first use on."""
    reward = load_from(folder, "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    return [1.0, 2.0]\n")
    before = signal.getsignal(signal.SIGTERM)
    assert judged(reward) == [1.0, 2.0]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_relative_run_directory_stays_where_it_was_asked_for(folder, tiny, monkeypatch):
    workspace(folder)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "lengths.txt").write_text("3")
    (folder / "moves.py").write_text(
        "import os, pathlib\nos.chdir('elsewhere')\n"
        "def fn(completions):\n"
        "    return [len(c) % int(pathlib.Path('lengths.txt').read_text()) for c in completions]\n"
        "def further(completions):\n    os.chdir('/')\n    return [0.0 for c in completions]\n"
    )
    line = "grpo --prompts p.jsonl --prompts-per-step 2 --group-size 2 --steps 2 --max-new-tokens 4 --out run"
    rewards = ["--reward", "moves.py:fn", "--reward", "moves.py:further", "--reward", "r.py:fn"]
    assert tether(line, "--model", tiny, *rewards[:2], *rewards[4:]) == 0
    assert (folder / "run" / "summary.json").is_file()
    assert not (folder / "elsewhere" / "run").exists()
    assert tether(line.replace("run", "second"), "--model", tiny, *rewards[2:]) == 0
    assert (folder / "second" / "summary.json").is_file()


# -- one event loop --------------------------------------------------------------------------------------------------


CLIENT = """
import asyncio
lock, calls = asyncio.Lock(), []

async def held(n):
    async with lock:  # belongs to the loop in which two wait for it first
        await asyncio.sleep(0)
    calls.append(asyncio.get_running_loop())
    return float(len(set(calls)))

async def first(completions):
    return await asyncio.gather(*map(held, completions))

async def second(completions):
    return await asyncio.gather(*map(held, completions))
"""


def test_a_client_of_the_module_serves_every_step(folder, tokenizer):
    (folder / "client.py").write_text(CLIENT)
    scorer = resolve_scorer(["client.py:first", "client.py:second"], tokenizer)
    for _ in range(3):
        (scored,) = scorer.score(GROUPS)
        assert [score.total for score in scored.scores] == [2.0, 2.0]


async def loop_of(completions):
    return [float(id(asyncio.get_running_loop()))] * len(completions)


def test_a_call_that_ends_when_it_is_cancelled_leaves_the_loop(folder):
    async def slow(completions):
        await asyncio.sleep(60)

    before = judged(FunctionReward("loop", loop_of))
    with pytest.raises(RewardError, match="did not return within"):
        judged(FunctionReward("slow", slow, deadline=0.05))
    assert judged(FunctionReward("loop", loop_of)) == before


def test_a_call_that_blocks_the_loop_does_not_block_the_next(folder):
    let_go = threading.Event()

    async def blocks(completions):
        let_go.wait(60)

    try:
        with pytest.raises(RewardError, match="did not return within"):
            judged(FunctionReward("blocks", blocks, deadline=0.05))
        assert len(judged(FunctionReward("loop", loop_of, deadline=30.0))) == 2
    finally:
        let_go.set()


@pytest.mark.parametrize("error", [SystemExit(3), KeyError("x"), asyncio.CancelledError()])
def test_what_a_coroutine_raises_ends_the_call_and_not_the_loop(error):
    async def fails(completions):
        raise error

    for _ in range(2):
        with pytest.raises(RewardError, match=f"raised {type(error).__name__}"):
            judged(FunctionReward("fails", fails, deadline=30.0))


# -- one import ------------------------------------------------------------------------------------------------------


def test_two_functions_of_a_file_share_its_state(folder, tokenizer):
    (folder / "shared.py").write_text(
        "print('imported')\nseen = []\n"
        "def first(completions):\n    seen.extend(completions)\n    return [0.0] * len(completions)\n"
        "def second(completions):\n    return [float(len(seen))] * len(completions)\n"
    )
    for spelling in ("shared.py", f"{folder}/shared.py", "./shared.py"):
        sources = Sources()
        first = load_function("shared.py:first", sources=sources)
        second = load_function(f"{spelling}:second", sources=sources)
        assert judged(first) == [0.0, 0.0]
        assert judged(second) == [2.0, 2.0]
    (scored,) = resolve_scorer(["shared.py:first", "shared.py:second"], tokenizer).score(GROUPS)
    assert [score.total for score in scored.scores] == [2.0, 2.0]


def test_another_run_imports_the_file_anew(folder):
    for value in (1.0, 2.0):
        (folder / "mended.py").write_text(f"def fn(completions):\n    return [{value}] * 2 # {'x' * int(value)}\n")
        assert judged(load_function("mended.py:fn")) == [value, value]


@pytest.mark.parametrize("stem", ["json", "sys", "two words", "helpers", "torch"])
def test_a_file_with_the_name_of_a_module_does_not_take_its_place(folder, stem):
    before = sys.modules.get(stem)
    (folder / f"{stem}.py").write_text("def fn(completions):\n    return [1.0, 2.0]\n")
    assert judged(load_function(f"{stem}.py:fn")) == [1.0, 2.0]
    assert stem == "two words" or sys.modules.get(stem) is before


WORKERS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def length(completion):
    return float(len(completion))

def fn(completions):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(length, completions))
"""
RUN = """
from tether.rewards.loading import load_function
from tether.types import Completion, FinishReason, Prompt, RolloutGroup

if __name__ == "__main__":
    completion = Completion(
        ids=(1,), mask=(True,), sampler_logp=(0.0,), finish_reason=FinishReason.EOS, text="abc", weights_version=0
    )
    groups = [RolloutGroup(prompt=Prompt(ids=(0,), text="p"), completions=(completion,))]
    (judged,) = load_function("sub/workers.py:fn", deadline=60.0).judge(groups)
    print(judged[0].value)
"""


def test_workers_that_are_spawned_import_the_file(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "workers.py").write_text(WORKERS)
    (folder / "run.py").write_text(RUN)
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("3.0\n", 0), done.stderr
