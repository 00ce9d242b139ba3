"""The fingerprint of data: equal where all is equal, everywhere; another where anything differs."""

import datetime
import subprocess
import sys
from dataclasses import replace

import pytest

from tether.data.fingerprint import digest, fingerprint
from tether.types import Demonstration, PreferencePair, Prompt

PROMPT = Prompt(ids=(0, 5), text="a", columns={"answer": "4", "n": [1, {"b": None, "a": 2.5}]})
CHAT = Prompt(ids=(0, 5), text="a", messages=({"role": "user", "content": "a"},))
PAIR = PreferencePair(prompt_ids=(0,), chosen_ids=(5, 1), rejected_ids=(6, 1), margin=0.5)
DEMONSTRATION = Demonstration(prompt_ids=(0,), completion_ids=(5, 1))
ALL = [PROMPT, CHAT, PAIR, DEMONSTRATION]


def test_it_is_the_same_in_every_process():
    known = "adcada1d366652a11e77645beb763053"
    assert fingerprint(ALL) == known
    code = "from test_fingerprint import *; print(fingerprint(ALL))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r}); {code}"]
    found = subprocess.run(command, env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == known


def test_equal_records_have_one_digest_whatever_the_order_of_their_columns():
    turned = {"n": [1, {"a": 2.5, "b": None}], "answer": "4"}
    assert digest(replace(PROMPT, columns=turned)) == digest(PROMPT)
    assert digest(replace(PAIR, margin=0.5)) == digest(PAIR)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PROMPT, replace(PROMPT, ids=(0, 6))),
        (PROMPT, replace(PROMPT, text="b")),
        (PROMPT, replace(PROMPT, columns={**PROMPT.columns, "answer": 4})),
        (PROMPT, replace(PROMPT, columns={})),
        (CHAT, replace(CHAT, messages=None)),
        (CHAT, replace(CHAT, messages=({"role": "system", "content": "a"},))),
        (PAIR, replace(PAIR, margin=0.25)),
        (PAIR, replace(PAIR, chosen_ids=PAIR.rejected_ids, rejected_ids=PAIR.chosen_ids)),
        (PAIR, replace(PAIR, prompt_ids=(0, 5), chosen_ids=(1,))),
        (DEMONSTRATION, Demonstration(prompt_ids=(0, 5), completion_ids=(1,))),
        (replace(PROMPT, columns={"day": datetime.date(2024, 2, 28)}),
         replace(PROMPT, columns={"day": datetime.date(2024, 2, 29)})),
        (replace(PROMPT, columns={"a": float("nan")}), replace(PROMPT, columns={"a": None})),
    ],
)  # fmt: skip
def test_another_record_has_another_digest(one, other):
    assert digest(one) != digest(other)
    assert fingerprint([one]) != fingerprint([other])


def test_order_and_number_count():
    assert len({fingerprint(records) for records in ([], [PAIR], [PAIR, PAIR], ALL, ALL[::-1])}) == 5


class Picture:
    """Like an image of PIL: its ``repr`` says where it is in memory, and not what it shows."""

    mode, size = "L", (2, 2)

    def __init__(self, octets):
        self.octets = octets

    def tobytes(self):
        return self.octets


def with_column(value):
    return digest(replace(PROMPT, columns={"x": [{"y": value}]}))


def test_an_image_counts_by_what_it_shows():
    assert with_column(Picture(b"1234")) == with_column(Picture(b"1234"))
    assert with_column(Picture(b"1234")) != with_column(Picture(b"1235"))
    image = pytest.importorskip("PIL.Image")
    red, blue = ((image.new("RGB", (2, 2), name) for _ in range(2)) for name in ("red", "blue"))
    assert len({with_column(one) for one in red}) == 1
    assert with_column(image.new("RGB", (2, 2), "red")) != with_column(next(blue))
    assert with_column(image.new("RGB", (1, 4))) != with_column(image.new("RGB", (4, 1)))


def test_arrays_count_whole_and_objects_without_their_address():
    numpy = pytest.importorskip("numpy")
    long = numpy.zeros(5000)
    other = long.copy()
    other[2500] = 1  # its repr is the same
    assert with_column(long) == with_column(long.copy()) != with_column(other)
    assert with_column(long) != with_column(long.astype("float32"))
    first, second = (type("Decoder", (), {})() for _ in range(2))
    assert repr(first) != repr(second)
    assert with_column(first) == with_column(second)
    assert with_column({"b", "a", "c"}) == with_column({"c", "b", "a"}) != with_column({"a", "b"})
