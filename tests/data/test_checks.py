"""What is found in the rows of a command, what is said about it, and what becomes of the rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tether.data.checks import DataReport, keep_apart, leaks
from tether.data.reading import BadRow
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tether.types import Demonstration, PreferencePair, Prompt
from tiny import byte_tokenizer

GOOD = [{"prompt": "q", "chosen": chosen, "rejected": "b"} for chosen in "acdefg"]
EQUAL = {"prompt": "q", "chosen": "a", "rejected": "a"}
LONG = {"prompt": "q" * 60, "chosen": "a", "rejected": "b"}
HOPELESS = {"prompt": "q", "chosen": "a" * 60, "rejected": "b"}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Writes rows, which may be lines in bytes, and gives the name of the file."""
    monkeypatch.chdir(tmp_path)

    def write(*rows, name="pairs.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return name

    return write


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD[0], EQUAL],
            "pairs.jsonl:2: chosen and rejected are equal, so the pair states no preference; "
            "leave it out with --on-bad-rows skip",
        ),
        (
            [EQUAL, GOOD[0], {}],
            "pairs.jsonl:1: chosen and rejected are equal, so the pair states no preference; "
            "1 more row cannot be used (line 3); leave them out with --on-bad-rows skip",
        ),
        (
            [GOOD[0], b"", b"\xff", EQUAL, b"{", {}, b"[]"],
            "pairs.jsonl:3: not valid UTF-8 (invalid start byte); "
            "4 more rows cannot be used (lines 4, 5, 6, ...); leave them out with --on-bad-rows skip",
        ),
        (
            [GOOD[0], LONG],
            "pairs.jsonl:2: prompt and longer side take 63 tokens and the model's context is 40; "
            "leave it out with --overlong drop, or cut its prompt with --overlong truncate",
        ),
        (
            [GOOD[0], LONG, EQUAL],
            "pairs.jsonl:2: prompt and longer side take 63 tokens and the model's context is 40; 1 more row "
            "cannot be used (line 3); leave them out with --overlong drop and --on-bad-rows skip "
            "(--overlong truncate cuts long prompts instead)",
        ),
        (
            [LONG, EQUAL],
            "pairs.jsonl:1: prompt and longer side take 63 tokens and the model's context is 40; nor can any other of "
            "the 2 rows be used; cut long prompts with --overlong truncate, and leave the other rows out with "
            "--on-bad-rows skip",
        ),
        (
            [EQUAL, EQUAL, {}],
            "pairs.jsonl:1: chosen and rejected are equal, so the pair states no preference; "
            "nor can any other of the 3 rows be used",
        ),
        ([EQUAL], "pairs.jsonl:1: chosen and rejected are equal, so the pair states no preference"),
    ],
)
def test_a_refusal_looks_at_every_row_and_names_the_way_out(source, tokenizer, rows, message):
    with pytest.raises(DataError) as caught:
        load_pairs(source(*rows), tokenizer, context=40)
    assert str(caught.value) == message


def test_what_is_skipped_is_counted_named_and_kept(source, tokenizer):
    rows = [GOOD[0], EQUAL, GOOD[1], b"\xff{", EQUAL, GOOD[0], LONG, HOPELESS, EQUAL, EQUAL]
    report = DataReport()
    pairs = load_pairs(source(*rows), tokenizer, context=40, overlong="truncate", on_bad_rows="skip", report=report)
    assert pairs[:3] == load_pairs(source(GOOD[0], GOOD[1], GOOD[0], name="good.jsonl"), tokenizer, context=40)
    assert len(pairs) == 4
    assert report.lines() == [
        "pairs.jsonl: 4 of 10 rows; equal sides 4 (lines 2, 5, 9, ...); not valid UTF-8 1 (line 4); "
        "duplicates 1 (line 6); over-long: truncated 1 (line 7); over-long: cannot be truncated 1 (line 8)"
    ]
    (summary,) = report.as_dict()
    assert {name: summary[name] for name in ("source", "rows", "kept")} == {
        "source": "pairs.jsonl",
        "rows": 10,
        "kept": 4,
    }
    assert summary["findings"]["equal sides"] == {"count": 4, "at": [2, 5, 9, 10]}
    assert [(row["where"], row["kind"]) for row in report.skipped[:2]] == [
        ("pairs.jsonl:2", "equal sides"),
        ("pairs.jsonl:4", "not valid UTF-8"),
    ]
    assert report.skipped[0]["row"] == EQUAL
    assert report.skipped[1]["row"] == "\\xff{"
    assert "63 tokens" in report.skipped[3]["reason"]
    assert report.skipped[3]["row"] == HOPELESS


def test_dropped_rows_are_written_down_too(source, tokenizer):
    report = DataReport()
    pairs = load_pairs(source(LONG, GOOD[0]), tokenizer, context=40, overlong="drop", report=report)
    assert len(pairs) == 1
    assert report.lines() == ["pairs.jsonl: 1 of 2 rows; over-long: dropped 1 (line 1)"]
    assert [row["row"] for row in report.skipped] == [LONG]


def test_rows_without_a_finding_leave_no_line(source, tokenizer):
    report = DataReport()
    load_pairs(source(*GOOD), tokenizer, context=40, report=report)
    assert report.lines() == []
    assert report.skipped == []
    assert report.as_dict() == [{"source": "pairs.jsonl", "rows": 6, "kept": 6, "findings": {}}]


def test_skipping_still_fails_where_nothing_is_left_and_over_long_rows_have_their_own_option(source, tokenizer):
    with pytest.raises(DataError, match=r"no row can be used: 0 of 2 rows; equal sides 2 \(lines 1, 2\); the first: "):
        load_pairs(source(EQUAL, EQUAL), tokenizer, context=40, on_bad_rows="skip")
    with pytest.raises(DataError, match=r"jsonl:3: .* context is 40; leave it out with --overlong drop"):
        load_pairs(source(EQUAL, GOOD[0], LONG), tokenizer, context=40, on_bad_rows="skip")
    with pytest.raises(DataError, match=r"jsonl:2: .* and cutting the prompt cannot make it fit; .*--on-bad-rows skip"):
        load_pairs(source(GOOD[0], HOPELESS), tokenizer, context=40, overlong="truncate")


def test_what_json_cannot_hold_is_reported_as_text(tmp_path, tokenizer):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    day = datetime.date(2024, 2, 29)
    pa.parquet.write_table(pa.Table.from_pylist([{"prompt": " ", "day": day}, {"prompt": "a", "day": day}]), path)
    report = DataReport()
    load_prompts(str(path), tokenizer, context=40, max_new_tokens=1, on_bad_rows="skip", report=report)
    assert report.lines() == [f"{path}: 1 of 2 rows; empty 1 (row 1)"]
    (row,) = report.skipped
    assert (row["where"], row["row"]) == (f"{path}:row 1", {"prompt": " ", "day": "datetime.date(2024, 2, 29)"})


def prompts(rows, source, tokenizer, report, name):
    return load_prompts(source(*rows, name=name), tokenizer, context=40, max_new_tokens=1, report=report)


@pytest.mark.parametrize(
    ("load", "training", "held_out"),
    [
        (load_pairs, [*GOOD[:2], {"chosen": "qb", "rejected": "qc"}, GOOD[3]], [GOOD[5], GOOD[1]]),
        (
            load_demonstrations,
            [{"text": "a"}, {"text": "ab"}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}],
            [{"text": "x"}, {"text": "ab"}],
        ),
        (prompts, [{"prompt": "a"}, {"prompt": "b", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c"}],
         [{"prompt": "d"}, {"prompt": "b"}]),
    ],
    ids=["pairs, swapped and with an implicit prompt", "demonstrations in two forms", "prompts of other columns"],
)  # fmt: skip
def test_held_out_rows_do_not_stay_in_training(source, tokenizer, load, training, held_out):
    report = DataReport()

    def records(rows, name):
        if load is prompts:
            return prompts(rows, source, tokenizer, report, name)
        return load(source(*rows, name=name), tokenizer, context=40, report=report)

    train, test = records(training, "train.jsonl"), records(held_out, "test.jsonl")
    message = (
        "train.jsonl:2: is held out too (test.jsonl:2); 1 more row cannot be used (line 3); "
        "leave them out with --on-bad-rows skip"
    )
    with pytest.raises(DataError) as caught:
        keep_apart(train, test, report=report)
    assert str(caught.value) == message
    assert report.lines() == []
    assert keep_apart(train, test, report=report, on_bad_rows="skip") == [train[0], train[3]]
    assert "train.jsonl: 2 of 4 rows; held out too 2 (lines 2, 3)" in report.lines()
    assert [row["row"] for row in report.skipped] == training[1:3]
    assert keep_apart([train[0]], test, report=report) == [train[0]]


def test_training_on_the_held_out_rows_alone_is_refused(source, tokenizer):
    report = DataReport()
    train, test = (load_pairs(source(*GOOD), tokenizer, context=40, report=report) for _ in range(2))
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: is held out too \(pairs.jsonl:1\); nor can any other of the 6"
    ):
        keep_apart(train, test, report=report, on_bad_rows="skip")


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple)


@given(st.lists(st.tuples(IDS, IDS, IDS), max_size=6), st.lists(st.tuples(IDS, IDS, IDS), max_size=6))
def test_leaks_are_those_that_a_search_finds(training, held_out):
    def pair(parts):
        return PreferencePair(prompt_ids=parts[0], chosen_ids=parts[1], rejected_ids=parts[2])

    def read(parts):
        return {parts[0] + parts[1], parts[0] + parts[2]}

    expected = {}
    for i, a in enumerate(training):
        found = [j for j, b in enumerate(held_out) if read(a) == read(b)]
        if found:
            expected[i] = found[0]
    assert leaks(list(map(pair, training)), list(map(pair, held_out))) == expected


def test_leaks_of_prompts_and_demonstrations():
    assert leaks([Prompt(ids=(0, 1), text="a")], [Prompt(ids=(0,), text="a"), Prompt(ids=(0, 1), text="b")]) == {0: 1}
    one = Demonstration(prompt_ids=(0,), completion_ids=(1, 2))
    assert leaks([one], [Demonstration(prompt_ids=(0, 1), completion_ids=(2,))]) == {0: 0}
    assert leaks([one], []) == {}


def test_prompts_cut_on_the_left_keep_their_first_token_and_their_end(source, tokenizer):
    report = DataReport()
    name = source({"prompt": "abcdefgh", "n": 1}, {"prompt": "fgh"})
    cut, whole = load_prompts(name, tokenizer, context=6, max_new_tokens=2, overlong="truncate", report=report)
    assert cut.ids == whole.ids
    assert cut.ids[0] == tokenizer.bos_token_id
    assert (cut.text, cut.columns) == ("fgh", {"n": 1})
    assert report.lines() == [f"{name}: 2 of 2 rows; over-long: truncated 1 (line 1)"]
    with pytest.raises(DataError, match="and cutting the prompt cannot make it fit"):
        load_prompts(name, tokenizer, context=6, max_new_tokens=5, overlong="truncate")


def test_conversations_cut_on_the_left(source):
    chat = byte_tokenizer(template=True)
    turns = [{"role": "user", "content": "x" * 30}]
    (prompt,) = load_prompts(source({"prompt": turns}), chat, context=20, max_new_tokens=4, overlong="truncate")
    assert len(prompt.ids) == 16
    assert prompt.text == "<s>xxxx[assistant]"
    assert prompt.messages == tuple(turns)


def test_sides_and_completions_are_never_cut(source, tokenizer):
    (pair,) = load_pairs(source(LONG), tokenizer, context=10, overlong="truncate")
    (whole,) = load_pairs(source(LONG), tokenizer, context=1000)
    assert (pair.chosen_ids, pair.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
    assert pair.prompt_ids == whole.prompt_ids[:8]
    row = {"prompt": "abcdef", "completion": "xyz"}
    (one,) = load_demonstrations(source(row), tokenizer, context=8, overlong="truncate")
    assert tokenizer.decode(list(one.prompt_ids + one.completion_ids)) == "<s>defxyz</s>"
    (one,) = load_demonstrations(source(row), tokenizer, context=6, overlong="truncate")
    assert tokenizer.decode(list(one.prompt_ids + one.completion_ids)) == "<s>fxyz</s>"
    with pytest.raises(DataError, match="cannot make it fit"):
        load_demonstrations(source(row), tokenizer, context=5, overlong="truncate")
    with pytest.raises(DataError, match="cannot make it fit"):
        load_demonstrations(source({"text": "abcdef"}), tokenizer, context=5, overlong="truncate")


def test_no_row_is_a_traceback(source, tokenizer):
    """Whatever stands in a row, it becomes a record or is reported as what it is."""
    deep = b'{"prompt": ' + b"[" * 100_000
    rows = [
        b'{"prompt": 1' + b"0" * 5000 + b"}",
        b'{"prompt": [[[{}]]], "margin": {"a": []}}',
        b'{"prompt": [{"role": 1, "content": "a"}]}',
        b'{"prompt": [null, {"role": "user", "content": "a"}]}',
        b'{"prompt": NaN}',
        b'{"prompt": -Infinity}',
        b'{"prompt": true}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "n": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b"\x00",
        b"\xef\xbb\xbf",
        deep,
        b'{"prompt": "' + b"a" * 200_000 + b'"}',
        b'{"prompt": "a", "n": [NaN, 1e999, 123456789012345678901234567890]}',
    ]
    report = DataReport()
    name = source(*rows)
    (kept,) = load_prompts(
        name, tokenizer, context=40, max_new_tokens=4, overlong="drop", on_bad_rows="skip", report=report
    )
    assert kept.text == "a"
    assert {row["where"] for row in report.skipped} == {f"{name}:{i}" for i in range(1, len(rows))}
    "\n".join(json.dumps(row, ensure_ascii=False) for row in report.skipped).encode()
    load = [{"chosen": "a", "rejected": "b", "margin": value} for value in (10**400, -(10**400), {"a": [[]]}, [1], "1")]
    with pytest.raises(DataError, match="no row can be used: 0 of 5 rows; wrong type 5"):
        load_pairs(source(*load), tokenizer, context=40, on_bad_rows="skip")
    with pytest.raises(DataError) as caught:
        load_pairs(source({"chosen": "a", "rejected": "b", "margin": "x" * 10_000}), tokenizer, context=40)
    assert len(str(caught.value)) < 200
    with pytest.raises(DataError) as caught:
        load_pairs(source({"x" * 10_000 + str(i): 0 for i in range(100)}), tokenizer, context=40)
    assert len(str(caught.value)) < 600


def test_a_template_that_stumbles_over_a_row_is_that_rows_fault(source):
    chat = byte_tokenizer(template=True)
    chat.chat_template = "{% for m in messages %}{{ m.content }}{% for c in m.calls %}{{ c }}{% endfor %}{% endfor %}"
    turn = {"role": "user", "content": "a"}
    rows = [{"prompt": [turn]}, {"prompt": [{**turn, "calls": 3}]}]
    with pytest.raises(DataError, match=r"pairs.jsonl:2: the chat template of .* refuses .*'int' object is not iter"):
        load_prompts(source(*rows), chat, context=40, max_new_tokens=4)


@pytest.mark.slow
def test_real_pairs(stories, shared_data):
    """Three files of helpfulness and harmlessness pairs hold 34 pairs of equal sides."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    report = DataReport()
    files = sorted((shared_data / "hh_rlhf").glob("*.gz"))
    for file in files:
        pairs = load_pairs(str(file), tokenizer, context=512, overlong="truncate", on_bad_rows="skip", report=report)
        assert all(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= 512 for p in pairs)
        assert all(p.prompt_ids[0] == tokenizer.bos_token_id for p in pairs)
    summary = report.as_dict()
    assert sum(source["findings"].get("equal sides", {"count": 0})["count"] for source in summary) == 34
    for source in summary:
        assert source["kept"] + sum(s["where"].startswith(source["source"]) for s in report.skipped) == source["rows"]


def test_a_bad_row_says_where_it_stands(source, tokenizer):
    report = DataReport()
    load_pairs(source(GOOD[0], EQUAL), tokenizer, context=40, on_bad_rows="skip", report=report)
    (bad,) = report.sources[0].skipped
    assert isinstance(bad, BadRow)
    assert (str(bad.where), bad.where.number, bad.where.unit) == ("pairs.jsonl:2", 2, "line")
