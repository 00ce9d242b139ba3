"""Three splits of the pairs: no pair and no prompt is in two of them, whatever the rows look like and are given as."""

from __future__ import annotations

import itertools
import random

import pytest

from commandline import write_rows
from tether.data.checks import DataReport
from tether.data.records import load_pairs
from tether.errors import DataError
from tether.models.loading import load_policy
from tether.training.common import Loaded
from tether.training.preference_splits import SHARED_PROMPT, small, split


@pytest.fixture
def loaded(tiny):
    model, tokenizer = load_policy(tiny)
    return Loaded(model, tokenizer, "float32", 0.0, report=DataReport(quiet=True))


def read(rows, loaded, file):
    source = write_rows(file, rows)
    return load_pairs(str(source), loaded.tokenizer, context=128, report=loaded.report)


def cut(pairs, loaded, *, stopping=None, test=None, on_bad_rows="fail", **shares):
    options = {"eval_share": 0.1, "test_share": 0.1, "seed": 0} | shares
    return split(pairs, stopping=stopping, test=test, loaded=loaded, on_bad_rows=on_bad_rows, **options)


def parts(splits):
    return splits.training, splits.stopping, splits.test


def explicit(prompt, i):
    return {"prompt": f"Q{prompt}", "chosen": f"yes {i}", "rejected": f"no {i}"}


def conversation(prompt, i):
    turns = [{"role": "user", "content": f"Q{prompt}"}]
    for turn in range(i % 3):  # some rows go on where others have their prompt
        turns += [{"role": "assistant", "content": f"a{turn}"}, {"role": "user", "content": f"b{turn}"}]
    return {side: [*turns, {"role": "assistant", "content": f"Well, {side} {i}"}] for side in ("chosen", "rejected")}


def written(prompt, i):
    answers = [f"Sure {side}{i}" for side in "ab"] if i % 2 else [f"{side}{i}" for side in "ab"]
    return {
        side: f"\n\nHuman: Q{prompt}\n\nAssistant: {answer}"
        for side, answer in zip(("chosen", "rejected"), answers, strict=True)
    }


def prompt_of(kind, row):
    if kind is explicit:
        return row["prompt"]
    if kind is conversation:
        return row["chosen"][0]["content"]
    return row["chosen"].split("\n\n")[1]


@pytest.mark.parametrize("kind", [explicit, conversation, written])
@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_in_two_splits(kind, seed, loaded, tmp_path):
    if kind is conversation:
        loaded.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}</s>"
    rng = random.Random(seed)
    rows = [kind(rng.randrange(40), i) for i in range(120)]
    pairs = read(rows, loaded, tmp_path / "pairs.jsonl")
    splits = cut(pairs, loaded, seed=seed)
    origin = loaded.report.origin
    prompts = [{prompt_of(kind, origin(pair)[0].values) for pair in part} for part in parts(splits)]
    assert all(prompts)
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))
    assert sum(map(len, parts(splits))) == 120
    assert all(abs(len(part) - 12) <= 6 for part in (splits.stopping, splits.test))
    assert parts(cut(pairs, loaded, seed=seed)) == parts(splits)


def test_copies_of_a_pair_are_in_one_split(loaded, tmp_path):
    """Without a prompt, each in either order, five times."""
    rows = [{"chosen": f"{a}{i}", "rejected": f"{b}{i}"} for i in range(30) for a, b in ("xy", "yx", "xy", "xy", "yx")]
    splits = cut(read(rows, loaded, tmp_path / "pairs.jsonl"), loaded)
    sides = [{frozenset((pair.chosen_ids, pair.rejected_ids)) for pair in part} for part in parts(splits)]
    assert list(map(len, sides)) == [24, 3, 3]
    assert len(frozenset().union(*sides)) == 30


def test_without_a_test_split_the_others_are_what_they_are_with_one(loaded, tmp_path):
    pairs = read([explicit(i, i) for i in range(100)], loaded, tmp_path / "pairs.jsonl")
    three, two = cut(pairs, loaded), cut(pairs, loaded, test_share=0)
    assert list(map(len, parts(three))) == [80, 10, 10]
    assert list(map(len, parts(two))) == [90, 10, 0]
    assert three.stopping == two.stopping
    assert three.judged == three.test
    assert two.judged == two.stopping


def test_given_files_are_taken_as_they_are(loaded, tmp_path):
    pairs = read([explicit(i, i) for i in range(20)], loaded, tmp_path / "pairs.jsonl")
    stopping = read([explicit(100 + i, i) for i in range(5)], loaded, tmp_path / "stop.jsonl")
    test = read([explicit(200 + i, i) for i in range(7)], loaded, tmp_path / "test.jsonl")
    assert parts(cut(pairs, loaded, stopping=stopping, test=test)) == (pairs, stopping, test)
    splits = cut(pairs, loaded, stopping=stopping)
    assert list(map(len, parts(splits))) == [18, 5, 2]


def test_a_split_that_is_cut_has_no_prompt_of_a_given_file(loaded, tmp_path):
    """Prompts 0-9 are in the file too, with other sides: their training rows stay, are counted, and are not cut."""
    pairs = read([explicit(i, i) for i in range(20)], loaded, tmp_path / "pairs.jsonl")
    stopping = read([explicit(i, 100 + i) for i in range(10)], loaded, tmp_path / "stop.jsonl")
    splits = cut(pairs, loaded, stopping=stopping, test_share=0.4)
    held = {loaded.report.origin(pair)[0].values["prompt"] for pair in splits.test}
    assert len(held) == 8
    assert held <= {f"Q{i}" for i in range(10, 20)}
    assert len(loaded.report.sources[0].findings[SHARED_PROMPT]) == 10


def test_a_pair_of_a_given_file_is_an_error_or_left_out(loaded, tmp_path):
    pairs = read([explicit(i, i) for i in range(20)], loaded, tmp_path / "pairs.jsonl")
    test = read([explicit(3, 3), explicit(50, 50)], loaded, tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"pairs.jsonl:4: is held out too \(.*test.jsonl:1\)"):
        cut(pairs, loaded, test=test)
    splits = cut(pairs, loaded, test=test, on_bad_rows="skip")
    assert pairs[3] not in splits.training + splits.stopping
    assert splits.test == test


def test_the_same_pair_in_both_given_files_is_an_error(loaded, tmp_path):
    pairs = read([explicit(i, i) for i in range(4)], loaded, tmp_path / "pairs.jsonl")
    stopping = read([explicit(50, 50)], loaded, tmp_path / "stop.jsonl")
    test = read([explicit(50, 50), explicit(51, 51)], loaded, tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"stop.jsonl:1: is held out too \(.*test.jsonl:1\)"):
        cut(pairs, loaded, stopping=stopping, test=test)


def test_too_few_prompts_for_three_splits(loaded, tmp_path):
    one = read([explicit(0, i) for i in range(9)], loaded, tmp_path / "one.jsonl")
    two = read([explicit(i % 2, i) for i in range(9)], loaded, tmp_path / "two.jsonl")
    three = read([explicit(i, i) for i in range(3)], loaded, tmp_path / "three.jsonl")
    assert list(map(len, parts(cut(one, loaded)))) == [9, 0, 0]
    assert list(map(bool, parts(cut(two, loaded)))) == [True, True, False]
    assert list(map(len, parts(cut(three, loaded)))) == [1, 1, 1]


def test_small_splits_have_a_line_each(loaded, tmp_path):
    pairs = read([explicit(i, i) for i in range(120)], loaded, tmp_path / "pairs.jsonl")
    lines = list(small(cut(pairs, loaded), wants_test=True))
    assert lines == [
        f"{name} split: 12 pairs, on which an accuracy of 75% has the 95% interval 47% to 91%; give more by "
        f"--{flag}-pairs or --{flag}-share"
        for name, flag in (("stopping", "eval"), ("test", "test"))
    ]
    assert list(small(cut(pairs, loaded, eval_share=0.25, test_share=0.25), wants_test=True)) == []
    assert list(small(cut(pairs, loaded, eval_share=0.25, test_share=0), wants_test=False)) == []
    (line,) = small(cut(pairs, loaded, eval_share=0.25, test_share=0), wants_test=True)
    assert line == "test split: none, because too few prompts are left; give --test-pairs"
