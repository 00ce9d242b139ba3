"""Samples are a sequence, and show as lines and as a table in which nothing is markup."""

from __future__ import annotations

import pytest

from tether.api.samples import Samples
from tether.report.completions import completion_of

row = {"finish_reason": "eos", "mask": [True]}
FOUND = Samples(
    (
        completion_of(row | {"prompt": "A<b>", "completion": " one\n\x1b[31mtwo", "score": 1.25}),
        completion_of(row | {"prompt": "B", "completion": " <script>", "score": -0.5}),
    )
)


def test_it_is_a_sequence():
    assert len(FOUND) == 2
    assert [one.prompt for one in FOUND] == ["A<b>", "B"]
    assert FOUND[-1].score == -0.5
    with pytest.raises(IndexError):
        FOUND[2]


def test_one_line_per_completion():
    first, second = repr(FOUND).splitlines()
    assert first.startswith("+1.250  A<b> | ")
    assert second.startswith("-0.500  B | ")
    assert "\x1b" not in first


def test_a_table_in_which_nothing_is_markup():
    shown = FOUND._repr_html_()
    assert shown.count("<tr>") == 3
    assert "A&lt;b&gt;" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert ">+1.250</td>" in shown
