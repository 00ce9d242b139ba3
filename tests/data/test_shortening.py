"""Prompts that are far too long: cut as if all of them had been encoded, whatever their length costs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from transformers import PreTrainedTokenizerFast

from tether.data import shortening
from tether.data.checks import DataReport
from tether.data.encoding import splits_at_spaces
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.data.shortening import without_middle
from tether.data.texts import common
from tether.data.tokenise import cut_left, encode
from tether.errors import DataError
from tether.models.loading import load_tokenizer
from tiny import byte_tokenizer

CONTEXT = 40
WORDS = st.lists(st.text("abcé.,'1\n", min_size=1, max_size=7), min_size=1, max_size=120).map(" ".join)


@pytest.fixture
def eager(monkeypatch):
    """Texts count as far too long from a few hundred characters."""
    monkeypatch.setattr(shortening, "LEAST", 16)
    monkeypatch.setattr(shortening, "FEW", 2)
    monkeypatch.setattr(shortening, "AT_LEAST", 1)
    monkeypatch.setattr(shortening, "HEAD", 8)


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def words(n: int, *, of: str = "word") -> str:
    return " ".join(f"{of}{i}" for i in range(n))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), load_tokenizer("base")], ids=["bytes", "base"])
@settings(max_examples=200, deadline=None)
@given(text=WORDS, tokens=st.integers(2, 30), room=st.integers(2, 30))
def test_the_tokens_that_are_kept_are_those_of_the_whole(tokenizer, text, tokens, room):
    assert splits_at_spaces(tokenizer)
    room = min(room, tokens)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST": 16, "FEW": 1, "AT_LEAST": 1, "HEAD": 1}.items():
            patch.setattr(shortening, name, value)
        short = without_middle(tokenizer, tokens, text)
    if short != text:
        assert len(encode(tokenizer, short)) > tokens
        assert cut_left(tokenizer, encode(tokenizer, short), room) == cut_left(tokenizer, encode(tokenizer, text), room)


def test_some_texts_are_shortened(eager):
    text = words(400)
    short = without_middle(byte_tokenizer(), 20, text)
    assert len(short) < 200
    assert text.startswith(short[:10])
    assert text.endswith(short[-80:])


def test_an_ordinary_text_is_encoded_whole():
    """Up to 16,384 characters in any case, and 64 per token of the context."""
    text = "ab " * 5461
    assert without_middle(byte_tokenizer(), 10, text) is text
    longer = "ab " * 10_900  # 32,700 characters: 64 times 512 tokens are 32,768
    assert without_middle(byte_tokenizer(), 512, longer) is longer
    assert len(without_middle(byte_tokenizer(), 10, longer)) < 9_000


def test_an_end_of_few_tokens_is_not_enough(eager):
    """White space that a normalizer removes takes no token, so that what is before it is kept."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    text = words(3000) + " " * 2000 + "end"
    short = without_middle(tokenizer, 100, text)
    assert 2000 < len(short) < 5000
    assert cut_left(tokenizer, encode(tokenizer, short), 100) == cut_left(tokenizer, encode(tokenizer, text), 100)
    mostly_nothing = "a" + " " * 2000 + "b"
    assert without_middle(tokenizer, 100, mostly_nothing) is mostly_nothing


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("", "", 0), ("a", "b", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("ab", "abc", 2), ("x" * 99, "x" * 50, 50)],
)
def test_what_two_texts_begin_with(a, b, same):
    assert common(a, b) == common(b, a) == same


LONG = words(300)
TURNS = [{"role": "user", "content": LONG}]
ANSWER = [{"role": "assistant", "content": "yes"}]
ROWS = {
    "prompts": (load_prompts, [{"prompt": LONG}, {"prompt": "<s>" + LONG}, {"prompt": TURNS}, {"prompt": "short"}]),
    "pairs": (
        load_pairs,
        [
            {"prompt": LONG, "chosen": " yes", "rejected": " no"},
            {"chosen": f"{LONG} yes", "rejected": f"{LONG} no"},
            {"chosen": f"{LONG}yes", "rejected": f"{LONG}yno"},
            {"prompt": TURNS, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "no"}]},
            {"chosen": [*TURNS, *ANSWER], "rejected": [*TURNS, {"role": "assistant", "content": "no"}]},
        ],
    ),
    "demonstrations": (
        load_demonstrations,
        [
            {"prompt": LONG, "completion": " yes"},
            {"messages": [*TURNS, *ANSWER]},
            {"prompt": f"{LONG} a", "completion": "b"},
        ],
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("tokenizer", ["bytes", "base"])
def test_rows_are_those_of_the_whole_texts(kind, tokenizer, tmp_path, request):
    load, rows = ROWS[kind]
    made = byte_tokenizer(template=True) if tokenizer == "bytes" else load_tokenizer("base")
    rows = rows if tokenizer == "bytes" else [row for row in rows if not any(isinstance(v, list) for v in row.values())]
    source = written(tmp_path / "rows.jsonl", rows)
    more = {"max_new_tokens": 4} if load is load_prompts else {}

    def records():
        report = DataReport()
        return load(source, made, context=CONTEXT, overlong="truncate", report=report, **more), report.as_dict()

    expected = records()
    assert expected[1][0]["findings"]["over-long: truncated"]["count"] >= len(rows) - 1
    request.getfixturevalue("eager")
    assert without_middle(made, CONTEXT, LONG) != LONG
    assert records() == expected


@pytest.fixture
def encoded(monkeypatch):
    """The lengths of all texts that are given to a tokenizer."""
    found = []
    original = PreTrainedTokenizerFast.__call__

    def call(self, texts, *more, **options):
        found.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return original(self, texts, *more, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)
    return found


HUGE = "some words " * 300_000


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_prompts, {"prompt": HUGE}),
        (load_prompts, {"prompt": "x" * len(HUGE)}),
        (load_pairs, {"prompt": HUGE, "chosen": " a", "rejected": " b"}),
        (load_pairs, {"chosen": f"{HUGE}a", "rejected": f"{HUGE}b"}),
        (load_demonstrations, {"prompt": HUGE, "completion": " a"}),
    ],
)
def test_of_a_huge_prompt_little_is_encoded(load, row, tmp_path, encoded):
    more = {"max_new_tokens": 4} if load is load_prompts else {}
    (record,) = load(
        written(tmp_path / "a.jsonl", [row]), byte_tokenizer(), context=CONTEXT, overlong="truncate", **more
    )
    ids = record.ids if load is load_prompts else record.prompt_ids
    assert 30 < len(ids) < CONTEXT
    assert max(encoded) < 20_000


@pytest.mark.parametrize("row", [{"chosen": HUGE, "rejected": "b"}, {"chosen": f"q {HUGE}", "rejected": "q b"}])
def test_a_huge_side_without_a_prompt_is_refused_by_its_beginning(row, tmp_path, encoded):
    source = written(tmp_path / "a.jsonl", [row, {"chosen": "a", "rejected": "b"}])
    with pytest.raises(
        DataError, match=r"a.jsonl:1: .* take more tokens than .* cutting the prompt cannot make it fit"
    ):
        load_pairs(source, byte_tokenizer(), context=CONTEXT, overlong="truncate")
    assert max(encoded) < 20_000


def test_a_huge_prompt_that_cannot_be_cut_says_that_its_length_is_a_lower_bound(tmp_path):
    source = written(tmp_path / "a.jsonl", [{"prompt": HUGE, "chosen": "a" * 60, "rejected": "b"}])
    with pytest.raises(DataError, match=r"take over \d+ tokens and the model's context is 40"):
        load_pairs(source, byte_tokenizer(), context=CONTEXT, overlong="truncate")
