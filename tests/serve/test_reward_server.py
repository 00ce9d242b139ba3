"""The reward server over HTTP: its scores are those of the model here, for many clients at once."""

import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import httpx2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import completion
from serving import reward_model, reward_server, until
from tether.errors import ConfigError, RewardError
from tether.models.reward import save_reward_model
from tether.rewards.client import Requests
from tether.rewards.learned import LearnedReward
from tether.rewards.remote import RemoteReward
from tether.rewards.signature import signature_of
from tether.serve import reward_server as command_module
from tether.serve.reward_server import ServeReward, listening
from tether.types import Prompt, RolloutGroup
from tiny import ARCHITECTURES, byte_tokenizer, make_model

HI = ({"role": "user", "content": "hi"},)


@pytest.fixture(scope="module")
def rewards(tiny):
    return reward_model(tiny)


def texts(count, seed=0, longest=40):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(1, longest))) for _ in range(count)]


def group(tokenizer, prompt, completions, **more):
    """What a policy with this tokenizer would have sampled."""
    return RolloutGroup(
        prompt=Prompt(ids=tuple(tokenizer(prompt)["input_ids"]), text=prompt, **more),
        completions=tuple(
            completion([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], text=text)
            for text in completions
        ),
    )


def values(reward, groups):
    return [judgement.value for row in reward.judge(groups) for judgement in row]


def figures(url, **headers):
    lines = httpx2.get(f"{url}/metrics", headers=headers, trust_env=False).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_32_clients_at_once_get_the_scores_of_the_model_here(rewards):
    local, served = rewards
    every = [group(served.tokenizer, prompt, texts(4, seed=i)) for i, prompt in enumerate(texts(32))]
    expected = [values(local, [one]) for one in every]
    assert len({round(value, 3) for row in expected for value in row}) > 60
    there = threading.Barrier(32)

    def ask(one):
        there.wait(20)
        with httpx2.Client(trust_env=False) as client:
            queries = [one.prompt.text + each.text for each in one.completions]
            answer = client.post(
                f"{url}/get_reward", json={"query": queries, "prompts": [one.prompt.text] * 4}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            return answer.json()["rewards"]

    with reward_server(served) as (url, _), concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, every))
        seen = figures(url)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert seen['tether_reward_requests_total{status="200"}'] == seen["tether_reward_request_seconds_count"] == 32
    assert seen["tether_reward_texts_total"] == 128
    assert seen["tether_reward_batch_seconds_count"] <= 16  # some waited for each other
    assert seen["tether_reward_queue_texts"] == 0
    tokens = sum(len(one.prompt.ids) + len(each.ids) for one in every for each in one.completions)
    assert seen["tether_reward_tokens_total"] == tokens


def test_alone_the_scores_are_bitwise_those_of_the_model_here(rewards):
    local, served = rewards
    groups = [group(served.tokenizer, prompt, texts(3, seed=i)) for i, prompt in enumerate(texts(5))]
    with reward_server(served) as (url, _):
        found = values(RemoteReward(name="far", url=f"{url}/get_reward", deadline=30.0), groups)
    assert found == values(local, groups)


def test_sampled_ids_that_are_not_those_of_their_text(tmp_path):
    """A policy may write a word in other pieces than its tokenizer: a run reads the pieces, and so does a server."""
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, merges=[("a", "b")]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    LlamaForCausalLM(ARCHITECTURES["llama"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    local, served = reward_model(str(tmp_path))
    prompt = Prompt(ids=tuple(tokenizer("ab")["input_ids"]), text="ab")
    assert prompt.ids == (4,)
    sampled = [RolloutGroup(prompt=prompt, completions=(completion([2, 3, 1], text="ab"), completion([4], text="ab")))]
    with reward_server(served) as (url, _):
        far = RemoteReward(name="far", url=f"{url}/get_reward", deadline=30.0, signature=signature_of(tokenizer))
        found, as_text = values(far, sampled), values(replace(far, signature=None), sampled)
    assert found == values(local, sampled)
    assert found[0] != found[1]
    assert as_text == pytest.approx([found[1]] * 2, abs=1e-6)


def test_conversations_are_read_by_the_template_of_the_reward_model(tmp_path):
    local, served = reward_model(make_model(tmp_path / "chat", template=True))
    policy = byte_tokenizer()  # writes them differently
    prompt = group(policy, "USER hi", ["yes", "no"], messages=HI)
    as_text = LearnedReward("text", local.model, local.tokenizer, same_vocabulary=False)
    with reward_server(served) as (url, _):
        found = values(RemoteReward(name="far", url=f"{url}/get_reward", deadline=30.0), [prompt])
    assert found == values(as_text, [prompt])


def test_a_text_may_lack_its_prompt_and_the_model_a_bos(tmp_path):
    directory = make_model(tmp_path / "model", "gpt2")
    _, served = reward_model(directory)
    served.tokenizer.backend_tokenizer.post_processor = None  # no BOS in front
    with reward_server(served) as (url, _):
        answer = httpx2.post(f"{url}/get_reward", json={"query": ["ab"]}, trust_env=False)
    assert answer.status_code == 200, answer.text


# -- refusals -------------------------------------------------------------------------------------------------------


def post(url, **request):
    return httpx2.post(f"{url}/get_reward", timeout=30, trust_env=False, **request)


def test_requests_that_are_refused(rewards):
    with reward_server(rewards[1], body_limit=1 << 20, queue_limit=3) as (url, batcher):
        answers = [
            post(url, content=b"{", headers={"Content-Type": "application/json"}),
            post(url, content=b'{"query": ["a"]}', headers={"Content-Type": "text/plain"}),
            post(url, json={"query": ["x" * 500]}),
            post(url, json={"query": ["a"] * 4}),
            post(url, json={"query": ["x" * (1 << 20)]}),
            post(url, content=iter([b" " * (1 << 20), b"{}"]), headers={"Content-Type": "application/json"}),
        ]
        assert [answer.status_code for answer in answers] == [400, 400, 400, 413, 413, 413]
        lines = [answer.json()["error"] for answer in answers]
        assert lines[0] == "the body is no JSON"
        assert lines[1] == "the Content-Type must be application/json"
        assert lines[2].startswith("query 0: reward 'served': prompt and completion take 502 tokens")
        assert lines[3] == "4 texts, and a request may hold 3"
        assert lines[4] == lines[5] == "the body is larger than 1 MiB"
        assert post(url, json={"query": ["a"]}).status_code == 200
        assert httpx2.get(f"{url}/get_reward", trust_env=False).status_code == 405
        assert httpx2.get(f"{url}/elsewhere", trust_env=False).status_code == 404
        assert batcher.counts.requests == {200: 1, 400: 3, 413: 3}
        assert batcher.held == 0


def test_a_full_queue_is_429_and_a_client_waits(rewards, monkeypatch, capsys):
    monkeypatch.setattr("tether.rewards.client.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("tether.rewards.client.LONGEST_WAIT", 0.05)
    go = threading.Event()

    def score(rows):
        assert go.wait(20)
        return [1.0] * len(rows)

    with (
        reward_server(rewards[1], queue_limit=2, score=score) as (url, batcher),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(post, url, json={"query": ["a", "b"]})
        until(lambda: batcher.held == 2)
        refused = post(url, json={"query": ["c"]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json() == {"error": "too many texts wait already; try again in 1 s"}
        threading.Timer(0.1, go.set).start()
        far = RemoteReward(name="far", url=f"{url}/get_reward", requests=Requests(retries=20), deadline=20.0)
        assert values(far, [group(rewards[1].tokenizer, "p", ["x"])]) == [1.0]
        assert first.result().json()["rewards"] == [1.0, 1.0]
    assert "429" in capsys.readouterr().err


def test_clients_that_give_up_leave_no_place_taken(rewards):
    go = threading.Event()

    def score(rows):
        assert go.wait(20)
        return [1.0] * len(rows)

    def gives_up(url):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/get_reward", json={"query": ["a"]}, timeout=0.2, trust_env=False)

    with reward_server(rewards[1], score=score) as (url, batcher), concurrent.futures.ThreadPoolExecutor(9) as pool:
        list(pool.map(gives_up, [url] * 8))
        patient = pool.submit(post, url, json={"query": ["b"]})
        until(lambda: batcher.held == 9)
        go.set()
        assert patient.result().json()["rewards"] == [1.0]
        until(lambda: batcher.held == 0)


def test_a_model_that_is_not_usable_is_an_error_of_one_line(rewards):
    def score(rows):
        raise RewardError("the reward model gave nan\nand more")

    with reward_server(rewards[1], score=score) as (url, _):
        answer = post(url, json={"query": ["a"]})
    assert (answer.status_code, answer.json()) == (500, {"error": "the reward model gave nan and more"})


def test_a_token_is_asked_for(rewards):
    with reward_server(rewards[1], token="s3cret") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = post(url, json={"query": ["a"]}, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert httpx2.get(f"{url}/metrics", headers=headers, trust_env=False).status_code == 401
        assert post(url, json={"query": ["a"]}, headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert figures(url, Authorization="Bearer s3cret")["tether_reward_texts_total"] == 1
        health = httpx2.get(f"{url}/health", trust_env=False)
        assert health.json() == {"status": "ok", "model": "served"}
        far = RemoteReward(name="far", url=f"{url}/get_reward", deadline=20.0)
        with pytest.raises(RewardError, match=r'answered 401 Unauthorized: {"error":"wrong or missing token"}$'):
            far.judge([group(rewards[1].tokenizer, "p", ["x"])])


# -- the command ----------------------------------------------------------------------------------------------------


def test_other_machines_need_a_token(monkeypatch):
    monkeypatch.delenv("TETHER_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0: other machines reach this address, so it needs a token"):
        command_module.main(ServeReward(model="m", host="0.0.0.0"))


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"serving needs the extra: pip install 'tether-rlhf\[serve\]'"):
        command_module.main(ServeReward(model="m"))


def test_a_port_that_is_taken():
    with (
        listening("127.0.0.1", 0) as one,
        pytest.raises(ConfigError, match=r"127.0.0.1:\d+: cannot listen there \(Address already in use\)"),
    ):
        listening("127.0.0.1", one.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(number, rewards, tmp_path):
    local, _ = rewards
    save_reward_model(local.model, local.tokenizer, tmp_path / "model", [((0, 5), (6, 1))])
    line = [sys.executable, "-m", "tether.cli", "serve-reward", "model", "--port", "0"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[-1]
        answer = httpx2.post(url, json={"query": ["ab"], "prompts": ["a"]}, trust_env=False, timeout=30)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert answer.json()["rewards"] == values(local, [group(local.tokenizer, "a", ["b"])])
    assert (process.returncode, out, err) == (0, "tether serve-reward: stopped\n", "")
