"""Runs in a real kernel: what a cell shows, and what its interrupt button does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("ipykernel")

from commandline import numbers
from kernels import Kernel, errors, kernel, printed

pytestmark = pytest.mark.slow

BEGIN = """
import os
import time
from pathlib import Path
import tether
from tether import stop_requests

os.chdir({directory!r})

def lengths(completions, **_):
    return [float(len(text) % 5) for text in completions]

arguments = dict(
    model={model!r}, prompts=[f"Word {{i}} is" for i in range(5)], rewards=lengths, steps=4, prompts_per_step=2,
    group_size=2, minibatches=2, max_new_tokens=4, save_every=2, matmul_dtype="float32",
)
"""

IN_A_REWARD = """
def slow(completions, **_):
    if Path("whole").exists() and not Path("now").exists():
        Path("now").touch()
        time.sleep(600)
    return lengths(completions)

slow.__name__ = "lengths"
tether.grpo.run(**{**arguments, "rewards": slow}, out="cut")
"""

AFTER_A_STEP = """
def wait(record):
    if record.step == 2:
        Path("now").touch()
        while not stop_requests.asked():
            time.sleep(0.01)

tether.grpo.run(**arguments, out="cut", on_step=wait)
"""

IN_FOREIGN_LOADING = """
import transformers
def stuck(*_, **__):
    Path("now").touch()
    time.sleep(600)

original, transformers.AutoTokenizer.from_pretrained = transformers.AutoTokenizer.from_pretrained, stuck
try:
    tether.grpo.run(**arguments, out="cut")
finally:
    transformers.AutoTokenizer.from_pretrained = original
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One kernel for all tests: what one of them interrupts has to serve the next."""
    with kernel(tmp_path_factory.mktemp("kernel")) as found:
        yield found


@pytest.fixture
def notebook(running, tiny, tmp_path):
    assert errors(running.run(BEGIN.format(model=str(tiny), directory=str(tmp_path)))) == []
    return running


def interrupted(notebook: Kernel, code: str, directory: Path) -> list[str]:
    """The traceback of a cell that is interrupted when it has written the file ``now``."""
    request = notebook.client.execute(code)
    notebook.interrupt_once(directory / "now")
    (error,) = errors(notebook.outputs(request))
    assert error["ename"] == "Interrupted"
    return error["traceback"]


@pytest.mark.parametrize(("code", "step"), [(IN_A_REWARD, 1), (AFTER_A_STEP, 3)], ids=["in a reward", "in an update"])
def test_the_interrupt_button_stops_a_run_that_then_resumes_to_the_same_numbers(notebook, tmp_path, code, step):
    assert errors(notebook.run("tether.grpo.run(**arguments, out='whole')")) == []
    (line,) = interrupted(notebook, code, tmp_path)
    assert line == f"Interrupted: stopped by SIGINT in step {step}; resume with the same call and resume=True"
    shown = notebook.run("run = tether.grpo.run(**arguments, out='cut', resume=True); len(run.metrics)")
    assert errors(shown) == []
    assert shown[-1]["data"]["text/plain"] == "4"
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_an_interrupt_before_the_run_has_begun_says_that_nothing_was_saved(notebook, tmp_path):
    assert interrupted(notebook, IN_FOREIGN_LOADING, tmp_path) == [
        "Interrupted: stopped at once; nothing was saved yet"
    ]
    assert not (tmp_path / "cut").exists()


def test_a_run_shows_a_table_that_is_drawn_over_and_its_result_and_figure_are_shown(notebook):
    outputs = notebook.run("run = tether.grpo.run(**arguments)\nrun")
    assert errors(outputs) == []
    drawn, shown = (one for one in outputs if one["kind"] in ("display_data", "execute_result"))
    page = drawn["data"]["text/html"]
    assert drawn["drawings"] > 1
    assert "<progress value='4' max='4'" in page
    assert [step for step in range(1, 5) if f">{step}/4</td>" in page] == [1, 2, 3, 4]
    assert "left" not in page
    assert drawn["data"]["text/plain"].startswith("grpo 4/4  in 0:")
    assert "\x1b" not in printed(outputs)
    assert "grpo 1/4" not in printed(outputs)
    assert "<table>" in shown["data"]["text/html"]
    (figure,) = notebook.run("run.plot('reward')")
    assert "image/png" in figure["data"]


def test_a_quiet_run_shows_nothing(notebook):
    assert notebook.run("run = tether.grpo.run(**arguments, quiet=True)") == []


def test_a_command_in_a_cell_prints_plain_lines(notebook, tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    program = Path(sys.executable).with_name("tether")
    line = f"!{program} grpo --model {tiny} --prompts p.jsonl --reward length:3 --steps 2 --prompts-per-step 2"
    text = printed(notebook.run(f"{line} --group-size 2 --max-new-tokens 4 --out run"))
    assert "\x1b" not in text
    assert [bool(re.search(rf"^grpo {step}/2  reward .*left \d+ s\r?$", text, re.M)) for step in (1, 2)] == [True, True]


def test_a_mistake_is_one_line(notebook):
    (error,) = errors(notebook.run("tether.grpo.run(**arguments, kl_coff=1)"))
    assert len(error["traceback"]) == 1
    assert error["traceback"][0].startswith("ConfigError: unknown argument 'kl_coff'")
