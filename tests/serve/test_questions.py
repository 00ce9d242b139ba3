"""Bodies of requests: which are read, how, and which are refused with one line."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import reward_model
from tether.rewards.signature import Signature, signature_of
from tether.serve.questions import Question, QuestionError, Text, question_of, reader_for, row_of
from tiny import byte_tokenizer, make_model

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def asked(**content):
    return question_of(json.dumps(content).encode()).texts


def test_texts():
    assert asked(query=["a b", "c d"], prompts=["a", "x"], labels=[1, None], more=[]) == [
        Text("a", " b"),
        Text("", "c d"),  # it does not begin with its prompt
    ]
    for prompts in ({}, {"prompts": None}, {"prompts": [None]}):
        assert asked(query=["a"], **prompts) == [Text("", "a")]
    both = asked(query=["a", "b"], prompts=["a", None], messages=[None, HI])
    assert both == [Text("a", ""), Text("", "b", tuple(HI))]


BAD = {
    "no JSON": (b"{", "the body is no JSON"),
    "no text": (b"\xff\xfe", "the body is no JSON"),
    "deep": (b"[" * 100_000, "the body is no JSON"),
    "a list": (b"[]", r"the body must be an object, found \[\]"),
    "nothing": (b"{}", "query must be a list of one text or more"),
    "none": (b'{"query": []}', "query must be a list"),
    "one text": (b'{"query": "a"}', "query must be a list"),
    "a number": (b'{"query": [1]}', "query must be a list"),
    "prompts": (b'{"query": ["a"], "prompts": ["a", "b"]}', "prompts must be a list of 1, one for each query"),
    "a prompt": (b'{"query": ["a"], "prompts": [1]}', "the prompt of query 0 must be text, found 1"),
    "messages": (b'{"query": ["a"], "messages": {}}', "messages must be a list of 1"),
    "a turn": (b'{"query": ["a"], "messages": [[{"role": "user", "content": "x"}]]}', "of two turns or more"),
    "turns": (b'{"query": ["a"], "messages": ["hi"]}', "messages of query 0 must be null or a list"),
    "ids": (b'{"query": ["a"], "ids": [[[1], [2]], [[1], [2]]]}', "ids must be a list of 1"),
    "one list of ids": (b'{"query": ["a"], "ids": [[1, 2]]}', "ids of query 0 must be null or two lists of numbers"),
    "no ids": (b'{"query": ["a"], "ids": [[[1], []]]}', "ids of query 0"),
    "a negative id": (b'{"query": ["a"], "ids": [[[1], [-2]]]}', "ids of query 0"),
    "a huge id": (b'{"query": ["a"], "ids": [[[1], [2147483648]]]}', "ids of query 0"),
    "an id that is true": (b'{"query": ["a"], "ids": [[[1], [true]]]}', "ids of query 0"),
    "a tokenizer": (b'{"query": ["a"], "tokenizer": "x"}', "tokenizer must have the number size and the texts text"),
    "its size": (b'{"query": ["a"], "tokenizer": {"size": "1", "text": "", "conversations": ""}}', "tokenizer must"),
    "an image": (
        json.dumps({"query": ["a"], "messages": [[{"role": "user", "content": [{"type": "image"}]}, HI[1]]]}).encode(),
        "query 0: messages holds a part of type 'image'",
    ),
}


@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD)
def test_bodies_that_are_refused(body, says):
    with pytest.raises(QuestionError, match=says):
        question_of(body)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "assistant", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)
LISTS = st.lists(ANY_JSON, max_size=3) | ANY_JSON


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({"query": st.lists(st.text(max_size=3), max_size=3) | ANY_JSON}, optional={
    "prompts": LISTS, "messages": LISTS, "ids": LISTS, "tokenizer": ANY_JSON
}))  # fmt: skip
def test_any_json_is_texts_or_one_line(content):
    said = ""
    try:
        assert len(question_of(json.dumps(content).encode()).texts) == len(content["query"])
    except QuestionError as error:
        said = str(error)
    assert "\n" not in said


def test_what_the_reward_model_reads(tiny):
    _, served = reward_model(tiny)
    own = served.tokenizer
    a, b = own("a")["input_ids"], own("b", add_special_tokens=False)["input_ids"]
    assert row_of(served, Text("a", "b"), 0) == (a, [*b, own.eos_token_id])
    padded = f"b{own.eos_token}{own.pad_token}{own.pad_token}"
    assert row_of(served, Text("a", padded), 0) == (a, [*b, own.eos_token_id])
    assert row_of(served, Text("a", ""), 0) == (a, [own.eos_token_id])
    assert row_of(served, Text("", "a"), 0) == (a[:1], [*a[1:], own.eos_token_id])


def test_ids_are_read_where_they_are_its_own(tiny):
    """``ab`` as one piece, say, where the tokenizer writes two."""
    _, served = reward_model(tiny)
    own, given = served.tokenizer, ((0, 50), (60, 61))
    text = Text("a", "b", None, given)
    same = reader_for(served, signature_of(byte_tokenizer()))  # the server's has a token for padding besides
    assert row_of(same, text, 0) == ([0, 50], [60, 61, own.eos_token_id])
    assert row_of(same, Text("a", "b", None, ((0,), (60, own.eos_token_id))), 0) == ([0], [60, own.eos_token_id])
    as_text = row_of(served, Text("a", "b"), 0)
    others = (None, Signature(300, "x", "y"), replace(signature_of(byte_tokenizer()), text="x"))
    for reader in (reader_for(served, one) for one in others):
        assert row_of(reader, text, 0) == as_text
    assert row_of(same, Text("a", "b"), 0) == as_text
    assert row_of(same, Text("a", "b", None, ((0,), (10**6,))), 0) == as_text  # it has no embedding for it


def test_ids_of_conversations_need_the_same_template(tmp_path):
    _, served = reward_model(make_model(tmp_path / "chat", template=True))
    text = Text("", "", tuple(HI), ((0, 50), (60, 61)))
    alike, unlike = (reader_for(served, signature_of(byte_tokenizer(template=one))) for one in (True, False))
    assert row_of(alike, text, 0) == ([0, 50], [60, 61, 1])
    assert row_of(unlike, text, 0) == row_of(served, Text("", "", tuple(HI)), 0)
    assert row_of(unlike, replace(text, turns=None), 0) == ([0, 50], [60, 61, 1])  # as plain text they are alike


def test_a_question_with_a_signature():
    signature = signature_of(byte_tokenizer())
    body = json.dumps({"query": ["ab"], "ids": [[[1], [2, 3]]], "tokenizer": vars(signature)}).encode()
    assert question_of(body) == Question([Text("", "ab", None, ((1,), (2, 3)))], signature)


def test_texts_that_it_cannot_read(tiny):
    _, served = reward_model(tiny)
    with pytest.raises(QuestionError, match="query 7: reward 'served': prompt and completion take 201 tokens, and the"):
        row_of(served, Text("", "x" * 199), 7)
    with pytest.raises(QuestionError, match=r"query 2: .*no chat template"):
        row_of(served, Text("", "", tuple(HI)), 2)
