"""Rows from every kind of source, and the error when one cannot be read."""

import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tether.data.reading import BadRow, read_rows
from tether.errors import DataError

ROWS = [{"prompt": "é\u2028x", "n": 1}, {"prompt": [{"role": "user", "content": "hi"}], "n": None}]


def lines(rows=ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def values(source) -> list[dict]:
    return [row.values for row in read_rows(str(source))]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.gz", "a.ndjson.gz", "A.JSONL", "a.Json.GZ"]
)
def test_json_lines(tmp_path, name):
    path = tmp_path / name
    content = lines().encode()
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert values(path) == ROWS
    assert [str(row.where) for row in read_rows(str(path))] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
@pytest.mark.parametrize(
    "content",
    [json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n\n " + json.dumps(ROWS) + "\n", "\ufeff" + json.dumps(ROWS)],
)
def test_one_array_of_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert values(path) == ROWS
    assert [str(row.where) for row in read_rows(str(path))] == [f"{path}:row 1", f"{path}:row 2"]


def test_rows_of_an_array_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 3, {"a": "\\ud800"}, {"a": %s}, [{}]]' % ("[" * 101 + "]" * 101))
    found = read_rows(str(path))
    assert [getattr(row, "kind", "") for row in found] == [
        "", "wrong type", "unpaired surrogate", "nested too deep", "wrong type"
    ]  # fmt: skip
    assert found[1].content == "3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": }]', r"begins as an array of rows and is not valid JSON \(.* at line 2, column 7\)$"),
        ('[{"a": 1}]\n{"a": 2}', r"not valid JSON \(Extra data at line 2, column 1\)"),
        ("[]", "holds no rows"),
        ("[" * 100_000, "nested deeper than 100"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(path))
    assert "on one line" not in str(caught.value)


def test_parquet_by_any_case(tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist([{"a": 1}]), tmp_path / "A.PARQUET")
    assert values(tmp_path / "A.PARQUET") == [{"a": 1}]


def test_blank_lines_count_but_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n   \n{"a": 2}')
    assert [(row.where.number, row.values["a"]) for row in read_rows(str(path))] == [(2, 1), (4, 2)]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert values(path) == [{"a": 1}, {"a": 2}]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "margin": 0.5}, {"prompt": None, "margin": None}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == rows
    assert str(read_rows(str(path))[1].where) == f"{path}:row 2"


def test_parquet_rows_that_python_cannot_hold(tmp_path):
    path = tmp_path / "a.parquet"
    text = pa.array([b"a", b"b", b"c\xff", b"d"]).view(pa.string())
    year_10000 = pa.array([0, 253402300800, 0, 0], pa.timestamp("s"))
    pa.parquet.write_table(pa.table({"prompt": text, "at": year_10000}), path)
    first, late, torn, last = read_rows(str(path))
    assert (first.values["prompt"], last.values["prompt"], str(last.where)) == ("a", "d", f"{path}:row 4")
    assert (late.kind, torn.kind) == ("wrong type", "not valid UTF-8")
    assert r"c\xff" in torn.content


def test_directory_of_files_with_splits(tmp_path):
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_text(lines([{"a": i} for i in range(5)]))
    (directory / "test.jsonl").write_text(lines([{"a": 9}]))
    assert values(directory) == [{"a": i} for i in range(5)]
    assert values(f"{directory}:test") == [{"a": 9}]
    assert values(f"{directory}:train[:2]") == [{"a": 0}, {"a": 1}]
    with pytest.raises(DataError, match=r"set:nowhere: not loadable as a data set .*nowhere"):
        read_rows(f"{directory}:nowhere")


def test_subset_of_a_data_set(tmp_path):
    for subset in ("main", "other"):
        (tmp_path / "set" / subset).mkdir(parents=True)
        (tmp_path / "set" / subset / "train.jsonl").write_text(lines([{"a": subset}]))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/*.jsonl\n"
        "- config_name: other\n  data_files: other/*.jsonl\n---\n"
    )
    assert values(f"{tmp_path}/set:other:train") == [{"a": "other"}]
    with pytest.raises(DataError, match="Config name is missing"):
        read_rows(f"{tmp_path}/set")


def test_saved_data_set(tmp_path):
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("asked", ["test", "train", "train[:1]", "main:train"])
def test_a_split_of_a_data_set_saved_without_one_is_refused(tmp_path, asked):
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=rf"saved:{re.escape(asked)}: the data set was saved without a split; give .*d$"
    ):
        read_rows(f"{tmp_path}/saved:{asked}")


def test_a_saved_split_is_read_by_its_name_alone(tmp_path):
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}], split="test").save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == values(f"{tmp_path}/saved:test") == [{"a": 1}, {"a": 2}]
    assert values(f"{tmp_path}/saved:test[1:]") == [{"a": 2}]
    for asked in ("train", "testing", "main:test"):
        with pytest.raises(DataError, match="was saved as the split 'test'"):
            read_rows(f"{tmp_path}/saved:{asked}")
    with pytest.raises(DataError, match=r"not loadable as a data set \(Unrecognized instruction"):
        read_rows(f"{tmp_path}/saved:test[x]")


def test_splits_saved_together(tmp_path):
    one = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == [{"a": 1}, {"a": 2}]
    assert values(f"{tmp_path}/saved:test") == [{"a": 2}]
    with pytest.raises(DataError, match=r"saved:dev: not loadable as a data set"):
        read_rows(f"{tmp_path}/saved:dev")


def test_directory_with_a_colon_in_its_name(tmp_path):
    directory = tmp_path / "a:b:c"
    directory.mkdir()
    (directory / "train.jsonl").write_text(lines([{"a": 1}]))
    assert values(directory) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"a": 1}\n{"a": \n',
            r"a.jsonl:2: not valid JSON \(.* at column \d+\); a row is one JSON object on one line",
        ),
        (b'[{"a": 1},\n{"a": 2}]\n', r"a.jsonl:1: not valid JSON .*one JSON object on one line"),
        (b'{"a": 1}\n[1, 2]\n', r"a.jsonl:2: a row is one JSON object on one line, found a list"),
        (b'{"a": 1}\n"text"\n', r"a.jsonl:2: .*found a str"),
        (b'{"a": 1}\n' * 40 + b'{"a": "\xff"}\n', r"a.jsonl:41: not valid UTF-8"),
        (b'{"a": 1}\n{"a": "x\x00"}\n', r"a.jsonl:2: not valid JSON \(Invalid control character"),
        (b'{"a": 1}\n\x00\n', r"a.jsonl:2: not valid JSON"),
        ('{"a": 1}\n{"a": 2}\n'.encode("utf-16"), r"a.jsonl:1: not valid UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1: holds an integer of thousands of digits"),
        (b"[" * 200_000 + b"\n", r"a.jsonl:1: nested deeper than 100"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, r"a.jsonl:1: nested deeper than 100"),
        (b'{"a": "x", "b": ["\\ud83d"]}\n', r"a.jsonl:1: b holds an unpaired surrogate"),
        (b'{"a": "x", "\\uDC00": 1}\n', r"a.jsonl:1: \\udc00 holds an unpaired surrogate"),
    ],
)
def test_malformed_lines_are_bad_rows(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    bad = next(row for row in read_rows(str(path)) if isinstance(row, BadRow))
    assert re.search(message, f"{bad.where}: {bad.reason}")
    assert bad.content == content.splitlines()[bad.where.number - 1].decode("utf-8", "backslashreplace").strip()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a": "x\\u0000"}', {"a": "x\x00"}),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, None),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', {"a": "x" * 10_000_000}),
        (b'{"a": ' + b"1" * 4000 + b"}", {"a": int("1" * 4000)}),
    ],
    ids=["emoji in two halves", "escaped NUL", "as deep as allowed", "10 MB", "4000 digits"],
)
def test_odd_lines_that_can_be_read(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    (row,) = read_rows(str(path))
    assert row.values == (json.loads(line) if expected is None else expected)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl: holds no rows"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_damaged_archives(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(lines([{"a": i} for i in range(1000)]).encode())
    damaged = bytearray(whole)
    damaged[20:60] = bytes(40)
    for content in (b'{"a": 1}\n', whole[:-100], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
            read_rows(str(path))


def test_damaged_and_empty_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a.parquet: not a readable parquet file"):
        read_rows(str(path))
    pa.parquet.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(str(path))


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "data/missing.json.gz", "./data/missing", "missing", "a/b/c", "a/b.csv"]
)
def test_missing_files_never_reach_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_rows(name)


@pytest.mark.parametrize("name", ["owner/name", "owner/name-v3.1:train", "owner/name:main:train[:10]"])
def test_hub_ids_do(monkeypatch, name):
    with pytest.raises(DataError, match=f"{name.split(':')[0]}.*not loadable as a data set .*Hub"):
        read_rows(name)


def test_unknown_format(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"unknown format; give .jsonl"):
        read_rows(str(tmp_path / "a.csv"))


def test_empty_directory(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="doesn't contain any data files"):
        read_rows(str(tmp_path / "nothing"))
