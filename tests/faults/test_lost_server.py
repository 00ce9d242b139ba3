"""A reward server that is gone in the middle of a run: the run stops, and continues with the same numbers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from answering import Answer, answering, free_port
from commandline import contents, read_rows, tether, untimed
from comparison import difference
from faulty import ALWAYS, assert_intact, assert_resumes, last_line
from runs import LINES
from serving import reward_model
from tether.models.reward import save_reward_model
from tether.rewards.remote import TOKEN, RemoteReward

GRPO = LINES["grpo"].replace("--reward r.py:fn", "--reward far:={url}")
ONCE = f"{ALWAYS} --save-every 10 --request-retries 1"


def lengths(content):
    return {"rewards": [len(text) % 5 for text in content["query"]]}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("tether.rewards.client.FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def server_process(model, port):
    """``tether serve-reward`` once it answers."""
    line = [sys.executable, "-m", "tether.cli", "serve-reward", model, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert "/get_reward" in process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_reward_server_that_is_killed_and_comes_back(here, tiny, before, monkeypatch, capfd):
    monkeypatch.setenv(TOKEN, "a-token-for-this-test")
    local, _ = reward_model(tiny, seed=3)
    save_reward_model(local.model, local.tokenizer, here / "judge", [((0, 5), (6, 1))])
    port = free_port()
    url = f"http://127.0.0.1:{port}/get_reward"
    line = f"{GRPO.format(url=url)} {ONCE} --matmul-dtype float32 --model {tiny}"
    with server_process("judge", port) as process:
        assert tether(f"{line} --out whole") == 0
        assert tether(f"{GRPO.format(url='judge')} {ONCE} --matmul-dtype float32 --model {tiny} --out here") == 0
        assert untimed(read_rows(here / "whole/metrics.jsonl")) == untimed(read_rows(here / "here/metrics.jsonl"))
        before(RemoteReward, "waiting", 3, process.kill)
        capfd.readouterr()
        assert tether(f"{line} --out out") == 2
    first, complaint = capfd.readouterr().err.splitlines()
    assert first.startswith(f"tether: reward 'far': no answer from http://127.0.0.1:{port}/get_reward (")
    assert first.endswith("; try 2 of 2 in 0.01 s")
    assert complaint.startswith("tether grpo: grpo step 3: reward 'far': no answer from http://127.0.0.1:")
    assert complaint.endswith("; tried 2 times; resume with 'tether resume out'")
    assert assert_intact(here / "out")[-1] == "step_000002.01"
    assert [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")] == [1, 2]
    with server_process("judge", port):
        assert_resumes(here / "out", here / "whole")
    assert len({row["reward"] for row in read_rows(here / "out" / "metrics.jsonl")}) == 4
    assert not any(b"a-token-for" in held for held in contents(here / "out").values())


def test_a_reward_server_that_is_busy_for_too_long_and_then_elsewhere(here, tiny, capfd):
    asked = []

    def busy_in_step_3(content):
        asked.append(content)
        return Answer(b"", status=503) if len(asked) >= 3 else lengths(content)

    with answering(lengths) as server:
        assert tether(f"{GRPO.format(url=server.url)} {ONCE} --model {tiny} --out whole") == 0
    with answering(busy_in_step_3) as server:
        assert tether(f"{GRPO.format(url=server.url)} {ONCE} --model {tiny} --out out") == 2
    assert "answered 503 Service Unavailable; tried 2 times; resume with 'tether resume out'" in last_line(capfd)
    with answering(lengths) as server:
        assert tether(f"resume out --reward far:={server.url}") == 0
    assert len(server.asked) == 2  # steps 3 and 4
    assert difference(here / "out", here / "whole") is None


def test_a_signal_ends_the_wait_for_a_server(here, tiny, capfd):
    let_go, asked = threading.Event(), []

    def hangs_in_step_3(content):
        asked.append(content)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            let_go.wait(30)
        return lengths(content)

    with answering(lengths) as server:
        assert tether(f"{GRPO.format(url=server.url)} {ONCE} --model {tiny} --out whole") == 0
    with answering(hangs_in_step_3) as server:
        assert tether(f"{GRPO.format(url=server.url)} {ONCE} --model {tiny} --out out") == 75
        let_go.set()
        assert "SIGTERM" in last_line(capfd)
        assert tether("resume out") == 0
    assert len(asked) == 5
    assert difference(here / "out", here / "whole") is None


def test_a_reward_server_that_is_gone_in_the_first_step_leaves_nothing(here, tiny, capfd):
    url = f"http://127.0.0.1:{free_port()}/get_reward"
    assert tether(f"{GRPO.format(url=url)} {ONCE} --model {tiny} --out out") == 2
    assert f"grpo step 1: reward 'far': no answer from {url}" in last_line(capfd)
    assert not (here / "out").exists()
