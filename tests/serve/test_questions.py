"""Bodies of requests: which are read, how, and which are refused with one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import reward_model
from tether.serve.questions import QuestionError, Text, row_of, texts_of

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def asked(**content):
    return texts_of(json.dumps(content).encode())


def test_texts():
    assert asked(query=["a b", "c d"], prompts=["a", "x"], labels=[1, None], more=[]) == [
        Text("a", " b"),
        Text("", "c d"),  # it does not begin with its prompt
    ]
    for prompts in ({}, {"prompts": None}, {"prompts": [None]}):
        assert asked(query=["a"], **prompts) == [Text("", "a")]
    assert asked(query=["a", "b"], prompts=["a", None], messages=[None, HI]) == [Text("a", ""), Text("", "", tuple(HI))]


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
    "an image": (
        json.dumps({"query": ["a"], "messages": [[{"role": "user", "content": [{"type": "image"}]}, HI[1]]]}).encode(),
        "query 0: messages holds a part of type 'image'",
    ),
}


@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD)
def test_bodies_that_are_refused(body, says):
    with pytest.raises(QuestionError, match=says):
        texts_of(body)


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
    "prompts": LISTS, "messages": LISTS
}))  # fmt: skip
def test_any_json_is_texts_or_one_line(content):
    said = ""
    try:
        assert len(texts_of(json.dumps(content).encode())) == len(content["query"])
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


def test_texts_that_it_cannot_read(tiny):
    _, served = reward_model(tiny)
    with pytest.raises(QuestionError, match="query 7: reward 'served': prompt and completion take 201 tokens, and the"):
        row_of(served, Text("", "x" * 199), 7)
    with pytest.raises(QuestionError, match=r"query 2: .*no chat template"):
        row_of(served, Text("", "", tuple(HI)), 2)
