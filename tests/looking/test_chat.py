"""``tether chat``: replies that a seed determines, to a person or to a pipe."""

from __future__ import annotations

import io

import pytest

from commandline import tether
from tether.config import DeviceOptions
from tether.looking.chat import Conversation, talk
from tether.types import Sampling
from tiny import make_model

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("templated"), seed=1, template=True)


def chat(monkeypatch, capsys, text: str, line: str, *more: object) -> tuple[list[str], str]:
    """What a chat with this input prints: its lines, and its remarks."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert tether(f"chat --max-new-tokens 6 --device cpu {line}", *more) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_a_seed_and_the_words_determine_the_replies(plain, monkeypatch, capsys):
    first, remarks = chat(monkeypatch, capsys, "hello\n", plain)
    assert remarks == ""
    assert chat(monkeypatch, capsys, "hello\n", plain)[0] == first
    assert chat(monkeypatch, capsys, "hello\n", f"{plain} --seed 1")[0] != first
    assert chat(monkeypatch, capsys, "/seed 1\nhello\n", plain)[0] != first
    assert chat(monkeypatch, capsys, "/seed 5\n/seed 0\nhello\n", plain)[0] == first


def test_bytes_that_are_no_text_are_replaced(plain, monkeypatch, capsys):
    expected, _ = chat(monkeypatch, capsys, "\ufffd\ufffd\n", plain)
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors))
        assert tether("chat --max-new-tokens 6 --device cpu", plain) == 0
        assert capsys.readouterr().out.splitlines() == expected


def test_reset_begins_anew(plain, monkeypatch, capsys):
    once, _ = chat(monkeypatch, capsys, "hello\n", plain)
    twice, _ = chat(monkeypatch, capsys, "hello\n/reset\nhello\n", plain)
    assert twice == once + once
    kept, _ = chat(monkeypatch, capsys, "hello\nhello\n", plain)
    assert kept != twice


def test_quit_and_the_end_of_the_input_end(plain, monkeypatch, capsys):
    once, _ = chat(monkeypatch, capsys, "hello", plain)  # without a line break at the end
    assert chat(monkeypatch, capsys, "hello\n\n/quit\nhello\n", plain)[0] == once
    assert chat(monkeypatch, capsys, "", plain)[0] == []


def test_what_is_no_command_is_said(plain, monkeypatch, capsys):
    out, remarks = chat(monkeypatch, capsys, "/again\n/seed x\n", plain)
    assert out == []
    assert "'/again' is no command: /reset forgets" in remarks
    assert "'/seed x' is no command" in remarks


def test_two_models_are_told_the_same(plain, templated, monkeypatch, capsys):
    own, _ = chat(monkeypatch, capsys, "hello\n", plain)
    both, _ = chat(monkeypatch, capsys, "hello\n", f"{plain} --against {templated}")
    assert both[: 1 + len(own)] == [f"[{plain}]", *own]
    assert f"[{templated}]" in both
    same, _ = chat(monkeypatch, capsys, "hello\n", f"{plain} --against {plain}")
    assert same == [f"[{plain}]", *own, "", f"[{plain}]", *own, ""]


def test_a_model_without_a_template_continues_the_text(plain):
    one = Conversation.of(plain, DeviceOptions(device="cpu"))
    first = one.reply("ab", sampling=SHORT, seed=3)
    one.reply("cd", sampling=SHORT, seed=4)
    assert one.text.startswith(f"ab{first}cd")
    assert one.turns == []


def test_a_model_with_a_template_answers_in_turns(templated):
    one = Conversation.of(templated, DeviceOptions(device="cpu"))
    answers = [one.reply(said, sampling=SHORT, seed=3) for said in ("ab", "cd")]
    assert [(turn["role"], turn["content"]) for turn in one.turns] == [
        ("user", "ab"), ("assistant", answers[0]), ("user", "cd"), ("assistant", answers[1]),
    ]  # fmt: skip
    one.reset()
    assert one.reply("ab", sampling=SHORT, seed=3) == answers[0]


def test_a_conversation_that_fills_the_context_costs_a_reply_only(plain, monkeypatch, capsys):
    """The context has 128 tokens."""
    out, remarks = chat(monkeypatch, capsys, f"{'a' * 200}\n{'b' * 126}\nhello\n/reset\nhello\n", plain)
    assert remarks.count("the model's context is 128; begin a new one with /reset") == 2
    assert out[-1:] == chat(monkeypatch, capsys, "hello\n", plain)[0][-1:]


def test_an_interruption_costs_a_reply_only(plain, monkeypatch, capsys):
    one = Conversation.of(plain, DeviceOptions(device="cpu"))
    generate = one.engine.generate

    def interrupted(*_, **__):
        one.engine.generate = generate
        raise KeyboardInterrupt

    one.engine.generate = interrupted
    talk([one], iter(["hello", "hello"]), sampling=SHORT, seed=0)
    out, err = capsys.readouterr()
    assert err == "(stopped)\n"
    assert out.count("\n") >= 1
    assert one.text.startswith("hello")


def test_replies_cannot_control_the_terminal(plain, monkeypatch, capsys):
    one = Conversation.of(plain, DeviceOptions(device="cpu"))
    monkeypatch.setattr(Conversation, "reply", lambda *_, **__: "a\x1b[31mb\nc")
    talk([one], iter(["hello"]), sampling=SHORT, seed=0)
    assert capsys.readouterr().out == "a\\u001b[31mb\nc\n"


def test_a_run_directory_is_no_model_and_names_its_own(tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("command: ppo\n")
    assert tether("chat", tmp_path / "run") == 2
    assert f"name its model, {tmp_path}/run/model" in capsys.readouterr().err
