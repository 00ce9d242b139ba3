"""An interrupted call stops at a safe point, says what to do, and resumes to the numbers of an uninterrupted one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import tether
from commandline import numbers
from commandline import tether as shell

PROMPTS = [f"Word {i} is" for i in range(5)]
SMALL = {
    "steps": 3, "prompts_per_step": 2, "group_size": 2, "minibatches": 2, "max_new_tokens": 4, "save_every": 2,
    "quiet": True, "matmul_dtype": "float32",
}  # fmt: skip


def lengths(completions, **_):
    return [float(len(c) % 5) for c in completions]


def striking(call: int, times: int = 1):
    """The same reward, in whose ``call``-th call the person presses Ctrl+C."""
    calls = []

    def lengths(completions, **_):
        calls.append(len(completions))
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return [float(len(c) % 5) for c in completions]

    return lengths


def grpo(tiny, **arguments):
    return tether.grpo.run(**{"model": tiny, "prompts": PROMPTS, "rewards": lengths, **SMALL, **arguments})


@pytest.mark.parametrize("call", [1, 2, 3])
def test_resumed_numbers_are_those_of_an_uninterrupted_run(tiny, tmp_path, call):
    whole = grpo(tiny, out=tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(tether.Interrupted) as caught:
        grpo(tiny, rewards=striking(call), out=tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is before
    assert str(caught.value) == f"stopped by SIGINT in step {call}; resume with the same call and resume=True"
    assert caught.value._render_traceback_() == [f"Interrupted: {caught.value}"]
    resumed = grpo(tiny, out=tmp_path / "cut", resume=True)
    assert numbers(resumed.path) == numbers(whole.path)


def test_without_out_the_directory_is_kept_and_named(tiny):
    with pytest.raises(tether.Interrupted, match=r"resume with the same call, out='.*' and resume=True") as caught:
        grpo(tiny, rewards=striking(2))
    out = str(caught.value).split("'")[1]
    try:
        assert len(grpo(tiny, out=out, resume=True).metrics) == 3
    finally:
        shutil.rmtree(out)


def test_a_second_interrupt_leaves_the_process_alive(tiny, tmp_path):
    def stubborn(completions, **_):
        with contextlib.suppress(BaseException):  # as foreign code does
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return [0.0 for _ in completions]

    with pytest.raises(tether.Interrupted, match="stopped at once; nothing was saved yet"):
        grpo(tiny, rewards=stubborn, out=tmp_path / "cut")


def test_a_finished_run_is_given_back(tiny, tmp_path):
    first = grpo(tiny, out=tmp_path / "run")
    assert numbers(grpo(tiny, out=tmp_path / "run", resume=True).path) == numbers(first.path)
    with pytest.raises(
        tether.RunError, match="already holds a run; resume it with the same call and resume=True, repl"
    ):
        grpo(tiny, out=tmp_path / "run")


@pytest.fixture
def cut(tiny, tmp_path) -> Path:
    with pytest.raises(tether.Interrupted):
        grpo(tiny, rewards=striking(2), out=tmp_path / "cut")
    return tmp_path / "cut"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_coef": 0.5}, r"other options: kl_coef \(0.04 -> 0.5\); kl_coef cannot change in a run"),
        ({"steps": 5}, r"other options: steps \(3 -> 5\); resume with the new ones by allow=True"),
        ({"rewards": {"other": lengths}}, r"other options: reward"),
        ({"rewards": (lengths, 2.0)}, r"other options: reward"),
        ({"prompts": ["Another"] * 5}, "prompts is not what it was when the run began"),
        ({"prompts": None}, "prompts of the run were given in Python; give them again"),
        ({"optimizer": torch.optim.SGD}, "optimizer: the run was begun with AdamW, and this is SGD"),
    ],
)
def test_what_has_changed_is_refused(tiny, cut, arguments, message):
    with pytest.raises(tether.TetherError, match=message):
        grpo(tiny, out=cut, resume=True, **arguments)


def test_a_safe_change_is_allowed(tiny, cut):
    assert len(grpo(tiny, out=cut, resume=True, steps=4, allow=True).metrics) == 4


def test_another_command_does_not_resume_it(tiny, cut):
    with pytest.raises(tether.RunError, match="is a run of 'tether grpo', and this is sft"):
        tether.sft.run(model=tiny, data=["a"], out=cut, resume=True)


def test_the_command_line_refuses_it_in_one_line(cut, capsys):
    assert shell("resume", cut) == 2
    assert capsys.readouterr().err == (
        f"tether resume: {cut}: prompts and reward of the run were given in Python; "
        "resume it from there: the call that began it, with resume=True\n"
    )


def test_an_optimizer_is_needed_again(tiny, tmp_path, capsys):
    own = {"optimizer": torch.optim.SGD, "rewards": "length:3"}
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    own["prompts"] = str(tmp_path / "p.jsonl")

    def strike(record):
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(tether.Interrupted):
        grpo(tiny, out=tmp_path / "cut", on_step=strike, **own)
    assert shell("resume", tmp_path / "cut") == 2
    assert "optimizer of the run were given in Python" in capsys.readouterr().err
    with pytest.raises(tether.ConfigError, match="optimizer: the run was begun with SGD, and this is AdamW"):
        grpo(tiny, out=tmp_path / "cut", resume=True, **{**own, "optimizer": None})
    resumed = grpo(tiny, out=tmp_path / "cut", resume=True, **own)
    assert (
        numbers(resumed.path)["metrics.jsonl"]
        == numbers(grpo(tiny, out=tmp_path / "whole", **own).path)["metrics.jsonl"]
    )
