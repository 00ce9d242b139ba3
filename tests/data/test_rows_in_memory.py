"""Rows that are Python objects are the rows that the same data would be in a file."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow
import pytest

from commandline import write_rows
from tether.data.memory import Rows, source_of
from tether.data.reading import BadRow, read_rows
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
COLUMNS = {"prompt": ["a", "b"], "answer": [1, 2]}
TURNS = [{"role": "user", "content": "Hi"}]


def of(given) -> list:
    source = source_of(given, name="prompts", text_column="prompt", turns_column="prompt")
    assert isinstance(source, Rows)
    return [row.values for row in read_rows(source)]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        tuple(ROWS),
        iter(ROWS),
        COLUMNS,
        {name: tuple(values) for name, values in COLUMNS.items()},
        pyarrow.table(COLUMNS),
        Rows("prompts", tuple(ROWS)),
    ],
    ids=["list", "tuple", "iterator", "columns", "tuples", "arrow", "rows"],
)
def test_the_same_rows(given):
    assert of(given) == ROWS


def test_pandas():
    pandas = pytest.importorskip("pandas")
    assert of(pandas.DataFrame(COLUMNS)) == ROWS
    frame = pandas.DataFrame({"prompt": ["a", None, "c"], "margin": [1.0, float("nan"), 2.5]}, index=[7, 3, 3])
    assert of(frame) == [
        {"prompt": "a", "margin": 1.0},
        {"prompt": None, "margin": None},
        {"prompt": "c", "margin": 2.5},
    ]
    assert [type(row["answer"]) for row in of(pandas.DataFrame(COLUMNS))] == [int, int]


def test_a_conversation_from_parquet_by_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": [TURNS, TURNS]}), tmp_path / "a.parquet")
    assert of(pandas.read_parquet(tmp_path / "a.parquet")) == [{"prompt": TURNS}, {"prompt": TURNS}]


def test_datasets():
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict(COLUMNS)
    assert of(one) == ROWS
    with pytest.raises(
        DataError, match=r"prompts: a data set with splits \(train, test\); give one of them, as data\['tr"
    ):
        of(datasets.DatasetDict({"train": one, "test": one}))


def test_strings_and_conversations_become_their_column():
    assert of(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert of([TURNS, tuple(TURNS)]) == [{"prompt": TURNS}, {"prompt": TURNS}]


def test_a_path_is_a_file():
    assert source_of(Path("a.jsonl"), name="prompts") == "a.jsonl"
    assert source_of("owner/name", name="prompts") == "owner/name"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "prompts: found int, from which no rows can be read; give a file or hub id"),
        (None, "prompts: found NoneType, from which"),
        (b"a", "prompts: found bytes, from which"),
        ({"prompt": ["a"], "answer": [1, 2]}, r"prompts: the columns have different lengths \(prompt 1, answer 2\)"),
        (
            {"prompt": "a"},
            "prompts: a dict holds one list per column, and 'prompt' is none; give a single row as a list",
        ),
        ({}, "prompts: an empty dict"),
        ([], "prompts: holds no rows"),
    ],
)
def test_what_holds_no_rows_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        of(given)


def test_a_row_that_is_none_is_named():
    found = read_rows(source_of([{"prompt": "a"}, 5, {1: "b"}, {"prompt": "\ud800"}], name="prompts"))
    assert [type(one) is BadRow for one in found] == [False, True, True, True]
    assert [str(one.where) for one in found] == [f"prompts:row {i}" for i in range(1, 5)]
    assert found[1].reason == "a row is a dict of columns, found int"
    assert found[2].reason == "a row is a dict of columns, found a column that no text names"
    assert "unpaired surrogate" in found[3].reason


def test_a_column_may_hold_what_json_does_not_know():
    moment = datetime.date(2024, 2, 29)
    assert of([{"prompt": "a", "on": moment, "kinds": {"x"}}]) == [{"prompt": "a", "on": moment, "kinds": {"x"}}]


def test_records_are_those_of_a_file(tokenizer, tmp_path):
    rows = [
        {"prompt": "Say", "chosen": " yes", "rejected": " no", "margin": 0.5},
        *[{"chosen": "ab", "rejected": "ac"}],
    ]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    assert load_pairs(rows, tokenizer, context=64) == load_pairs(str(file), tokenizer, context=64)
    texts = ["One two", "three"]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    assert load_demonstrations(texts, tokenizer, context=64) == load_demonstrations(str(file), tokenizer, context=64)
    file = write_rows(tmp_path / "prompts.jsonl", ROWS)
    found = load_prompts(COLUMNS, tokenizer, context=64, max_new_tokens=4)
    assert found == load_prompts(str(file), tokenizer, context=64, max_new_tokens=4)


def test_pairs_cannot_be_strings(tokenizer):
    with pytest.raises(DataError, match="pairs:row 1: a row is a dict of columns here, found str"):
        load_pairs(["a"], tokenizer, context=64)
