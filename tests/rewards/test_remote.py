"""Rewards of a server: what is asked, what is believed, and what happens while it is busy or gone."""

import threading
import time
from dataclasses import replace

import pytest

from answering import Answer, answering, free_port
from helpers import completion
from tether.errors import RewardError
from tether.rewards import remote
from tether.rewards.client import Requests
from tether.rewards.combine import WeightedSum
from tether.rewards.remote import TOKEN, RemoteReward
from tether.rewards.resolve import part_names, resolve_scorer
from tether.rewards.signature import signature_of
from tether.runtime.changes import changes
from tether.types import Prompt, RolloutGroup
from tiny import byte_tokenizer

HI = ({"role": "user", "content": "hi"},)


def groups(size=2, prompts=2, **prompt):
    return [
        RolloutGroup(
            prompt=Prompt(ids=(0, i), text=f"p{i} ", columns={"label": i, "other": "x"}, **prompt),
            completions=tuple(completion([5 + j, 1], text=f"c{i}{j}") for j in range(size)),
        )
        for i in range(prompts)
    ]


def reward(url, **options):
    return RemoteReward(name="far", url=url, **{"requests": Requests(retries=2), "deadline": 20.0} | options)


def values(one, given=None):
    return [[judgement.value for judgement in row] for row in one.judge(given or groups())]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("tether.rewards.client.FIRST_PAUSE", 0.01)
    monkeypatch.delenv(TOKEN, raising=False)


def lengths(content):
    return {"rewards": [len(text) for text in content["query"]]}


def test_what_is_asked_and_what_comes_of_it():
    with answering(lambda content: {"rewards": [1, 2.5, -3, 0], "scores": [9] * 4}) as server:
        assert values(reward(server.url)) == [[1.0, 2.5], [-3.0, 0.0]]
    (asked,) = server.asked
    assert asked.path == "/get_reward"
    assert "authorization" not in asked.headers
    assert asked.content == {
        "query": ["p0 c00", "p0 c01", "p1 c10", "p1 c11"],
        "prompts": ["p0 ", "p0 ", "p1 ", "p1 "],
        "labels": [0, 0, 1, 1],
    }


def test_conversations_are_sent_as_turns_too():
    with answering(lengths) as server:
        reward(server.url).judge([*groups(1, 1), *groups(1, 1, messages=HI)])
    assert server.asked[0].content["messages"] == [None, [*HI, {"role": "assistant", "content": "c00"}]]


def test_ids_go_with_the_signature_of_their_tokenizer(tokenizer):
    with answering(lengths) as server:
        resolve_scorer([server.url], tokenizer).score(groups(1))
    content = server.asked[0].content
    assert content["ids"] == [[[0, 0], [5, 1]], [[0, 1], [5, 1]]]
    assert content["tokenizer"] == vars(signature_of(tokenizer))
    assert content["tokenizer"]["size"] == len(tokenizer)


def test_signatures(tokenizer):
    """The same for tokenizers that give the same ids; tokens behind the others make no difference."""
    chat, own = byte_tokenizer(template=True), signature_of(tokenizer)
    assert signature_of(byte_tokenizer()) == own
    assert signature_of(chat).text == own.text
    assert signature_of(chat).conversations != own.conversations
    chat.add_special_tokens({"additional_special_tokens": ["<more>"]})
    assert signature_of(chat).size == own.size + 1
    assert signature_of(chat, own.size).text == own.text
    assert signature_of(chat).text != own.text
    swapped = byte_tokenizer()
    swapped.eos_token = "<s>"
    assert signature_of(swapped).text != own.text


def test_a_step_is_several_requests_at_the_same_time(monkeypatch):
    monkeypatch.setattr(remote, "PER_REQUEST", 3)
    there = threading.Barrier(4)

    def answer(content):
        there.wait(10)
        return lengths(content)

    given = [replace(group, prompt=replace(group.prompt, text="p" * i)) for i, group in enumerate(groups(2, 6))]
    with answering(answer) as server:
        found = values(reward(server.url), given)
    assert found == [[i + 3.0] * 2 for i in range(6)]
    assert [len(asked.content["query"]) for asked in server.asked] == [3] * 4


def test_no_more_requests_than_allowed(monkeypatch):
    monkeypatch.setattr(remote, "PER_REQUEST", 1)

    def answer(content):
        time.sleep(0.005)
        return lengths(content)

    with answering(answer) as server:
        reward(server.url, requests=Requests(concurrency=3)).judge(groups(4, 4))
    assert len(server.asked) == 16
    assert server.most == 3


def test_extra_logs_are_parts():
    logs = {"format": [0.0, 1.0, 0.5, 0.5], "version": 3}
    with answering(lambda content: {"rewards": [1, 2, 3, 4], "extra_logs": logs}) as server:
        first, second = WeightedSum(((reward(server.url), 2.0),)).score(groups())
    assert [score.total for score in first.scores] == [2.0, 4.0]
    assert second.scores[0].parts == {"far": 3.0, "far/format": 0.5, "far/version": 3.0}


BAD = {
    "no rewards": ({"scores": [1] * 4}, 'which is no {"rewards": [...]}'),
    "a list": ([1, 2, 3, 4], 'which is no {"rewards": [...]}'),
    "too few": ({"rewards": [1, 2, 3]}, "answered 3 values as rewards for 4 completions"),
    "too many": ({"rewards": [1] * 5}, "answered 5 values as rewards for 4 completions"),
    "one number": ({"rewards": 1.0}, "answered 1.0 as rewards for 4 completions"),
    "NaN": (b'{"rewards": [1, NaN, 2, 3]}', "answered nan as rewards for completion 1 of a request"),
    "infinity": (b'{"rewards": [1, 2, 1e999, 3]}', "answered inf as rewards for completion 2"),
    "a huge integer": (b'{"rewards": [1, 2, 3, ' + b"9" * 400 + b"]}", "no finite number"),
    "null": ({"rewards": [None, 1, 2, 3]}, "answered None as rewards for completion 0"),
    "text": ({"rewards": ["1", 1, 2, 3]}, "answered '1' as rewards for completion 0"),
    "true": ({"rewards": [True, 1, 2, 3]}, "answered True as rewards for completion 0"),
    "no JSON": (b"<html>", "answered b'<html>', which is no JSON"),
    "deep JSON": (b"[" * 200_000, "which is no JSON"),
    "logs": ({"rewards": [1] * 4, "extra_logs": {"a": [1]}}, "answered 1 values as a for 4 completions"),
    "logs that are none": ({"rewards": [1] * 4, "extra_logs": [1]}, "answered the extra_logs [1]"),
    "400": (Answer({"error": "a bad \x1b[31m request"}, status=400), "answered 400 Bad Request: {"),
    "401": (Answer(b"", status=401), "answered 401 Unauthorized"),
    "a redirect": (Answer(b"", status=302, headers={"Location": "http://elsewhere/"}), "answered 302 Found"),
}


@pytest.mark.parametrize(("answer", "says"), BAD.values(), ids=BAD)
def test_what_is_not_believed(answer, says):
    with answering(lambda content: answer) as server, pytest.raises(RewardError) as caught:
        values(reward(server.url))
    assert str(caught.value).startswith(f"reward 'far': {server.url} ")
    assert says in str(caught.value)
    assert len(server.asked) == 1  # it would answer the same again


def test_an_answer_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("tether.rewards.client.LARGEST", 1000)
    with answering(lambda content: b" " * 2000) as server, pytest.raises(RewardError, match="answered more than 0 MiB"):
        values(reward(server.url))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(status, capsys):
    answers = iter([Answer(b"busy", status=status), Answer(b"", status=status)])
    with answering(lambda content: next(answers, None) or lengths(content)) as server:
        assert values(reward(server.url)) == [[6.0, 6.0], [6.0, 6.0]]
    assert len(server.asked) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"tether: reward 'far': {server.url} answered {status} ")
    assert first.endswith(": busy; try 2 of 3 in 0.01 s")
    assert second.endswith("; try 3 of 3 in 0.02 s")


def test_a_connection_that_breaks_is_made_again(capsys):
    answers = iter([Answer(b"", status=0)])
    with answering(lambda content: next(answers, None) or lengths(content)) as server:
        assert values(reward(server.url)) == [[6.0, 6.0], [6.0, 6.0]]
    assert capsys.readouterr().err.startswith(f"tether: reward 'far': no answer from {server.url} (")


def test_retry_after_is_heeded(monkeypatch):
    slept = []
    sleep = remote.all_of.__globals__["asyncio"].sleep

    async def noted(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr("tether.rewards.client.asyncio.sleep", noted)
    answers = iter([Answer(b"", status=429, headers={"Retry-After": after}) for after in ("7", "9999")])
    with answering(lambda content: next(answers, None) or lengths(content)) as server:
        values(reward(server.url))
    assert slept == [7.0, 60.0]


def test_a_server_that_stays_busy(capsys):
    with (
        answering(lambda content: Answer(b"", status=503)) as server,
        pytest.raises(RewardError, match=r"answered 503 Service Unavailable; tried 3 times$"),
    ):
        values(reward(server.url))
    assert len(server.asked) == 3


def test_an_outage_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(remote, "PER_REQUEST", 1)
    url = f"http://127.0.0.1:{free_port()}/get_reward"
    with pytest.raises(RewardError, match=rf"^reward 'far': no answer from {url} \(.*\); tried 3 times$"):
        values(reward(url), groups(4, 4))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_server_that_hangs():
    let_go = threading.Event()
    with answering(lambda content: let_go.wait(20)) as server:
        with pytest.raises(RewardError, match=r"^reward 'far' did not return within 0.1 s; raise --reward-deadline"):
            values(reward(server.url, deadline=0.1))
        let_go.set()


def test_rewards_of_servers_and_functions_wait_together(tokenizer):
    there = threading.Barrier(2)

    def answer(content):
        there.wait(10)  # both servers are asked before either answers
        return lengths(content)

    with answering(answer) as one, answering(answer) as other:
        scorer = resolve_scorer([f"a:={one.url}", f"b:={other.url}=0.5", "length:3=0"], tokenizer)
        (first, _) = scorer.score(groups())
    assert first.scores[0].total == pytest.approx(9.0)


# -- addresses and tokens -------------------------------------------------------------------------------------------


def test_an_address_as_a_reward(tokenizer):
    scorer = resolve_scorer(["http://127.0.0.1:5000/get_reward=0.5"], tokenizer, deadline=9.0)
    ((found, weight),) = scorer.rewards
    assert (found.name, found.url, found.deadline, weight) == (
        "127.0.0.1",
        "http://127.0.0.1:5000/get_reward",
        9.0,
        0.5,
    )
    names = part_names([(None, "http://a:1/x"), (None, "https://b/y"), ("c", "http://a:2/x")])
    assert names == ["a", "b", "c"]
    assert part_names([(None, "http://a:1/x"), (None, "http://a:2/x")]) == ["http://a:1/x", "http://a:2/x"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ftp://host/x", "not an address; write http://host:port/path"),
        ("http://", "not an address"),
        ("http://host:port/x", "not an address"),
        ("http://me:secret@host/x", "an address of a reward has no user, password, query or fragment"),
        ("http://host/x?key=1", "an address of a reward has no user"),
        ("http://host/x?key=secret", "an address of a reward has no user"),
        ("http://host/x#y", "an address of a reward has no user"),
        ("http://host/x=half", "the weight 'half' is not a number"),
    ],
)
def test_addresses_that_are_none(spec, says, tokenizer):
    with pytest.raises(RewardError) as caught:
        resolve_scorer([spec], tokenizer)
    assert says in str(caught.value)


def test_the_token_comes_from_the_environment(monkeypatch, tokenizer):
    monkeypatch.setenv(TOKEN, "s3cret-token")
    with answering(lengths) as server:
        scorer = resolve_scorer([server.url], tokenizer)
        scorer.score(groups())
    assert server.asked[0].headers["authorization"] == "Bearer s3cret-token"
    assert "s3cret" not in repr(scorer)
    assert resolve_scorer(["https://far.example/x"], tokenizer).rewards[0][0].token == "s3cret-token"
    with pytest.raises(RewardError, match=r"the token in TETHER_REWARD_TOKEN would be sent over an unencrypted"):
        resolve_scorer(["http://far.example/x"], tokenizer)
    monkeypatch.setenv(TOKEN, "two\nlines")
    with pytest.raises(RewardError, match="holds characters that no token has"):
        resolve_scorer(["https://far.example/x"], tokenizer)


def test_a_proxy_does_not_get_what_is_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with answering(lengths) as server:
        assert values(reward(server.url)) == [[6.0, 6.0], [6.0, 6.0]]


def test_a_server_may_have_moved_when_a_run_is_resumed():
    def differ(one, other):
        return changes({"reward": [one]}, {"reward": [other]})

    assert not differ("http://a:1/get_reward", "http://a:2/get_reward")
    assert not differ("x:=http://a:1/get_reward", "x:=https://b/get_reward")
    assert differ("http://a:1/get_reward", "http://b:1/get_reward")  # it is reported by its host
    assert differ("x:=http://a:1/get_reward", "x:=http://a:1/other")
    assert differ("http://a:1/get_reward", "http://a:1/get_reward=0.5")
