"""Many texts encoded at once are each text encoded alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tether.data import loading
from tether.data.checks import DataReport
from tether.data.encoding import Encoder, Written, splits_at_spaces
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tiny import byte_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
MERGES = [("a", "b"), ("Ġ", "a"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("1", "2"), (",", "Ġ"), ("'", "s"), ("Ġa", "b"), ("Ġ", "1")]


def bpe(pattern=None, *, normalizer=None, template="<s> $A", added=(), **options) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits as GPT-2, or by a pattern."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *dict.fromkeys("".join(merge) for merge in MERGES)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES, **options))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_]) if split else bytes_
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    if template:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(list(added))
    return tokenizer


PROVED = {
    "gpt2": bpe(template=None),
    "bos": bpe(),
    "bos and eos": bpe(template="<s> $A </s>"),
    "llama 3": bpe(LLAMA_3, ignore_merges=True),
    "qwen": bpe(QWEN, normalizer=normalizers.NFC(), template=None),
    "added": bpe(added=["<|end|>", AddedToken("  ", special=False)]),
}
TEXT = st.text(st.sampled_from("ab 12,'s\n\t\r\u00a0\u2003\x1c\u0301é<>|") | st.characters(exclude_categories=["Cs"]))
TEXTS = st.lists(TEXT | st.lists(TEXT | st.sampled_from(["<s>", "</s>", "<|end|>", " ", "ab"])).map("".join))


@pytest.mark.parametrize("name", PROVED)
@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_word_by_word_gives_the_same_ids(name, texts):
    tokenizer = PROVED[name]
    assert splits_at_spaces(tokenizer)
    quick, plain = Encoder(tokenizer, by_words=True), Encoder(tokenizer)
    written = [Written(text, special) for text in texts for special in (True, False)]
    quick.prepare(written)
    for one in written:
        assert quick(one) == plain(one)


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe(r"[a-z ]+"),
        bpe(added=[AddedToken("<|x|>", lstrip=True)]),
        bpe(added=["two words"]),
        bpe(normalizer=normalizers.Lowercase()),
        bpe(normalizer=normalizers.Replace(" ", "_")),
        bpe(dropout=0.1),
    ],
)
def test_what_cannot_be_proved_is_encoded_whole(tokenizer):
    assert not splits_at_spaces(tokenizer)


def test_special_tokens_around_a_text():
    encoder = Encoder(bpe(template="<s> $A </s>"), by_words=True)
    inner = encoder(Written("ab 12", False))
    assert encoder(Written("ab 12", True)) == [0, *inner]
    assert encoder(Written("<s>ab 12", True)) == [0, *inner]
    assert encoder(Written("ab 12", False)) == inner


@pytest.mark.parametrize("by_words", [True, False])
def test_equal_ids_are_one_object(by_words):
    encoder = Encoder(bpe(), by_words=by_words)
    texts = [Written(text, True) for text in ("é é é", "é x é")]
    encoder.prepare(texts)
    large = [i for text in texts for i in encoder(text) if i > 256] or [i for text in texts for i in encoder(text)]
    assert len({id(i) for i in large}) == len(set(large))


def test_what_is_remembered_has_a_limit(monkeypatch):
    monkeypatch.setattr("tether.data.encoding.CACHED", 10)
    encoder = Encoder(bpe(), by_words=True)
    for i in range(50):
        encoder.prepare([Written(f"word{i} ab", True)])
        assert encoder(Written(f"word{i} ab", True)) == Encoder(bpe())(Written(f"word{i} ab", True))
    assert len(encoder._first) <= 3


@pytest.mark.parametrize("overlong", ["fail", "drop", "truncate"])
@pytest.mark.parametrize("length", [100, 30_000, 200_000])
def test_a_row_far_beyond_the_context_is_refused_by_its_beginning(tmp_path, monkeypatch, overlong, length):
    """With what is said of any row that is too long; nothing of more than a few thousand characters is encoded."""
    encoded = []
    original = Encoder._encode

    def encode(self, texts, special):
        encoded.extend(map(len, texts))
        return original(self, texts, special)

    monkeypatch.setattr(Encoder, "_encode", encode)
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a b" * length, "rejected": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = DataReport()
    options = {"context": 40, "overlong": overlong, "report": report}
    if overlong == "drop":
        assert len(load_pairs(str(tmp_path / "a.jsonl"), byte_tokenizer(), **options)) == 1
        assert set(report.sources[0].findings) == {"over-long: dropped"}
        (skipped,) = report.skipped
        assert skipped["row"] == rows[1]
    else:
        with pytest.raises(DataError, match=r"a.jsonl:2: prompt and longer side.* take .*tokens.*context") as caught:
            load_pairs(str(tmp_path / "a.jsonl"), byte_tokenizer(), **options)
        assert ("cutting the prompt cannot make it fit" in str(caught.value)) is (overlong == "truncate")
    assert max(encoded) < 10_000


def test_a_long_text_of_few_tokens_is_kept(tmp_path):
    """White space that a normalizer removes takes no token, however long it is."""
    tokenizer = bpe(normalizer=normalizers.Replace(Regex(" +"), " "))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a" + " " * 300_000 + "b"}))
    (prompt,) = load_prompts(str(tmp_path / "a.jsonl"), tokenizer, context=40, max_new_tokens=4)
    assert len(prompt.ids) < 10


def test_rows_in_small_parts_are_the_same_rows(tmp_path, monkeypatch):
    rows = [{"prompt": f"q {i} " + "x" * (i % 7), "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(40)]
    rows[7]["chosen"] = rows[7]["rejected"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load():
        report = DataReport()
        options = {"context": 99, "on_bad_rows": "skip", "report": report}
        return load_pairs(str(tmp_path / "a.jsonl"), byte_tokenizer(), **options), report.as_dict()

    whole = load()
    assert len(whole[0]) == 39
    for rows_, characters in ((1, 10**9), (3, 10**9), (512, 1), (512, 50)):
        monkeypatch.setattr(loading, "ROWS", rows_)
        monkeypatch.setattr(loading, "CHARACTERS", characters)
        assert load() == whole


def test_progress_of_a_large_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "ROWS", 2)
    monkeypatch.setattr(loading, "FIRST", -1.0)
    monkeypatch.setattr(loading, "EVERY", -1.0)
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n' * 6)
    load_demonstrations(str(tmp_path / "a.jsonl"), byte_tokenizer(), context=40)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(", left")[0] for line in said] == ["2 of 6 rows", "4 of 6 rows"]
    monkeypatch.setattr(loading, "FIRST", 60.0)
    load_demonstrations(str(tmp_path / "a.jsonl"), byte_tokenizer(), context=40)
    assert not capsys.readouterr().err


def test_many_rows_take_little_more_than_their_words(tmp_path, monkeypatch):
    """Counted, not timed: each distinct word is encoded once, in batches."""
    calls = []
    original = PreTrainedTokenizerFast.__call__

    def call(self, texts, *more, **options):
        calls.append(texts)
        return original(self, texts, *more, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)
    rows = [{"prompt": f"one two {i % 9}", "chosen": " three four", "rejected": " five six"} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_pairs(str(tmp_path / "a.jsonl"), byte_tokenizer(), context=99)) == 400
    assert len(calls) < 20
    assert sum(len(text) if isinstance(text, list) else 1 for text in calls) < 60
