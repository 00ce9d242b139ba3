"""A judge whose API fails in the middle of a run: nothing that was paid is paid again, and the numbers are the same."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml

from answering import Answer, answering
from commandline import contents, tether
from comparison import difference
from faulty import ALWAYS, last_line
from runs import LINES
from tether.training.task import REPLIES

GRPO = LINES["grpo"].replace("r.py:fn", "judge:kind.yaml")
ONCE = f"{ALWAYS} --save-every 10 --request-retries 0"


def reply(content):
    """The length of the response, of 10 at most, with some words that differ."""
    response = json.loads(content["messages"][1]["content"])["response"]
    text = json.dumps({"reason": "x" * len(response), "score": len(response) % 11})
    usage = {"prompt_tokens": 7, "completion_tokens": len(text)}
    return {"choices": [{"message": {"content": text}}], "usage": usage}


def write_judge(here, url, **more):
    judge = {"url": url.replace("/get_reward", "/v1"), "model": "m", "rubric": "Be long.", "key_env": "KIND_KEY"}
    (here / "kind.yaml").write_text(yaml.safe_dump(judge | {"output_price": 0.5} | more))


def questions(server):
    return Counter(json.dumps(one.content, sort_keys=True) for one in server.asked)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("KIND_KEY", "sk-of-this-test")


def test_a_judge_that_fails_in_the_middle_is_not_paid_twice(here, tiny, capfd):
    fails = []

    def answer(content):
        return Answer(b"", status=503) if fails and len(server.asked) == fails[0] else reply(content)

    with answering(answer) as server:
        write_judge(here, server.url)
        assert tether(f"{GRPO} {ONCE} --model {tiny} --out whole") == 0
        whole = questions(server)
        assert set(whole.values()) == {1}
        assert server.asked[0].headers["authorization"] == "Bearer sk-of-this-test"
        server.asked.clear()
        fails.append(sum(whole.values()) - 1)  # in the last step
        line = f"{GRPO} {ONCE} --request-concurrency 1 --model {tiny} --out out"
        assert tether(line) == 2
        assert "grpo step 4: reward 'kind': http" in (said := last_line(capfd))
        assert "answered 503 Service Unavailable; resume with 'tether resume out'" in said
        failed = json.dumps(server.asked[fails[0] - 1].content, sort_keys=True)
        fails[0] = 0
        kept = len(list((here / "out" / REPLIES).rglob("*.json")))
        assert tether("resume out --request-concurrency 16 --allow") == 0
        assert questions(server).keys() == whole.keys()
        again = questions(server) - whole
        assert again[failed] == 1
        assert again.total() <= 2  # the one that failed, and one that it cut off
    assert kept >= sum(whole.values()) - 3
    assert len(list((here / "out" / REPLIES).rglob("*.json"))) == sum(whole.values())
    assert difference(here / "out", here / "whole") is None
    assert not any(b"sk-of-this-test" in held for held in contents(here / "out").values())
    assert "sk-of-this-test" not in capfd.readouterr().err


def test_a_judge_that_fails_in_the_first_step_leaves_nothing(here, tiny, capfd):
    with answering(lambda content: Answer(b"", status=401)) as server:
        write_judge(here, server.url)
        assert tether(f"{GRPO} {ONCE} --model {tiny} --out out") == 2
    assert "grpo step 1: reward 'kind': http" in last_line(capfd)
    assert not (here / "out").exists()


def test_a_rubric_that_changed_is_refused_when_a_run_is_resumed(here, tiny, capfd):
    with answering(reply) as server:
        write_judge(here, server.url)
        assert tether(f"{GRPO} {ONCE} --model {tiny} --out out") == 0
        write_judge(here, server.url, rubric="Be short.")
        assert tether("resume out --steps 5 --allow") == 2
        assert "reward kind is not what it was when the run began" in last_line(capfd)
        write_judge(here, server.url)
        assert tether("resume out --steps 5 --allow") == 0


def test_a_judge_of_held_out_prompts(here, tiny):
    with answering(reply) as server:
        write_judge(here, server.url, cache="replies")
        held = "--eval-prompts held_prompts.jsonl --eval-group-size 2 --eval-reward judge:kind.yaml"
        assert tether(f"{LINES['grpo']} {ALWAYS} {held} --model {tiny} --out out") == 0
        asked = len(server.asked)
        evaluated = "--prompts held_prompts.jsonl --reward judge:kind.yaml --max-new-tokens 5"
        assert tether(f"eval --model {tiny} {evaluated}") == 0
    assert len(server.asked) == asked  # the run's reference wrote the same, with the seeds of every evaluation
    assert not (here / "out" / REPLIES).exists()
    assert len(list((here / "replies").rglob("*.json"))) == len(server.asked)
    summary = json.loads((here / "out" / "summary.json").read_text())
    assert "kind" in json.dumps(summary)
