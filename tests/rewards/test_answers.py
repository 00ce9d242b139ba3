"""Final answers: which notations are one number, which are not, and where a text states its answer."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tether.rewards.answer_rules import exact_answer
from tether.rewards.answers import canonical, final_answer, marked, number


@pytest.mark.parametrize(
    ("value", "notations"),
    [
        (
            "7",
            ["7", "+7", "7.", "7.0", "07", "$7", "7%", r"7\%", r"\$7", " 7 ", "14/2", r"\frac{14}{2}", ".7e1"],
        ),
        ("-5", ["-5", "- 5", "\u22125", "-$5", "$-5", "-5.00", "-10/2", "10/-2", r"-\frac{10}{2}", r"\frac{-10}{2}"]),
        ("1234", ["1234", "1,234", "1,234.0", "1{,}234", r"1\,234", r"1,\!234", "1\u202f234", "1\u00a0234", "$1,234"]),
        (
            "1/2",
            ["1/2", "0.5", ".5", "+.5", "0.50", "2/4", "1 / 2", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\frac12"],
        ),
        ("3/2", ["3/2", "1.5", "1 1/2", r"1\frac{1}{2}", r"1 \tfrac{1}{2}", "1.50", "15e-1"]),
        ("-3/2", ["-3/2", "-1.5", "-1 1/2", r"-1\frac{1}{2}"]),
        ("1500", ["1500", "1,500", "1.5e3", "1.5E+3", r"1.5 \times 10^{3}", r"1.5\cdot10^3", "1.5*10^3", "1.5×10^3"]),
        ("0", ["0", "-0", "+0", "0.0", "0/3", "00"]),
        ("1/3", ["1/3", "2/6", r"\frac{1}{3}"]),
        ("9007199254740993", ["9007199254740993", "9,007,199,254,740,993", "9007199254740993.0"]),
        ("50", ["50", "50%", r"50\%", "50.0%"]),
    ],
)
def test_notations_of_one_number(value, notations):
    for notation in notations:
        assert number(notation) == Fraction(value), notation
        assert exact_answer(None)(completions=[f"#### {notation}"], answer=[value]) == [1.0], notation
        assert exact_answer(None)(completions=[value], answer=[notation]) == [1.0], notation


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("9007199254740993", "9007199254740992"),
        ("0.1", "0.1000000000000000055511151231257827"),  # one float
        ("1/3", "0.333333333333333333333"),
        ("1/2", "2/1"),
        ("50%", "0.5"),
        ("1,234", "1.234"),
        ("7", "-7"),
        ("1e3", "1e-3"),
        ("1e400", "1e401"),  # beyond all floats
        ("1e-400", "0"),
        ("1 1/2", "11/2"),
    ],
)
def test_different_numbers(one, other):
    assert number(one) is not None
    assert number(one) != number(other)
    assert exact_answer(None)(completions=[f"#### {one}"], answer=[other]) == [0.0]


@pytest.mark.parametrize(
    "text",
    ["", "-", "+", ".", "$", "1/0", "1,23", "1234,567", "5 5", "1/2/3", "10^8", "x", "5x", "2e", "1e", "inf", "nan",
     "²", "٣", "5\n6", "--5", r"\frac{1}{2}\pi", r"\frac{1}{0}", "72 clips", "9" * 5000, "1e99999", "0x1"],
)  # fmt: skip
def test_no_numbers(text):
    assert number(text) is None
    assert canonical(text) == text.strip().lower()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 5-3", 3),
        ("in 10-15 days", 15),
        ("f(x)-3", 3),
        ("x=-4", -4),
        ("(-3)", -3),
        ("it is +7", 7),
        ("x = 1/2.", Fraction(1, 2)),
        (r"so $\frac{1}{2}$ of it", Fraction(1, 2)),
        (r"so $-\frac{1}{2}$", Fraction(-1, 2)),
        ("about 1.5e3 of them", 1500),
        ("1,234,567.89 dollars", Fraction("1234567.89")),
        ("1, 2", 2),
        ("0.5%", Fraction(1, 2)),
        ("Paris", "paris"),
    ],
)
def test_the_last_number_of_a_completion(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("a\n####72\n", "72"),
        ("#### 72\n\nQuestion: next", "72"),
        ("#### Paris", "Paris"),
        ("#### Paris  \n\n", "Paris"),
        ("#### Step 1\nadd\n#### Step 2\nso it is 7", ""),  # headings
        ("#### 72\n#### Why\nbecause", "72"),
        ("#### Why\nbecause\n#### 72", "72"),
        (r"#### Answer" "\n" r"it is \boxed{4}", "4"),
        (r"\boxed{4}" "\n#### 5", "4"),
        (r"\boxed{1} or \boxed {2}", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4", ""),
        (r"\boxed{}", ""),
        ("##### 5", ""),
        ("### 5", ""),
        ("####", ""),
        ("", ""),
    ],
)
def test_where_a_text_marks_its_answer(text, answer):
    assert marked(text) == answer


@pytest.mark.parametrize("answer", [72, 72.0, Fraction(72), Decimal("72.0"), "72", r"\boxed{72}", "so 1 + 71\n#### 72"])
def test_answers_of_any_type(answer):
    assert exact_answer(None)(completions=["it is 72", "it is 73"], answer=[answer, answer]) == [1.0, 0.0]


@pytest.mark.parametrize("answer", [True, "Paris", "New York"])
def test_answers_that_are_text(answer):
    assert exact_answer(None)(completions=[f"#### {answer}", "#### 1"], answer=[answer, answer]) == [1.0, 0.0]


# -- every notation of a number ---------------------------------------------------------------------------------------


values = st.one_of(
    st.integers(-(10**30), 10**30).map(Fraction),
    st.fractions(max_denominator=1000),
    st.decimals(allow_nan=False, allow_infinity=False, places=6).map(Fraction),
)


def decimal_digits(value: Fraction) -> str | None:
    """The value in decimals, where it has finitely many."""
    for places in range(40):
        shifted = abs(value) * 10**places
        if shifted.denominator == 1:
            digits = str(shifted.numerator).rjust(places + 1, "0")
            return digits[:-places] + "." + digits[-places:] if places else digits
    return None


@st.composite
def notation(draw, value: Fraction) -> str:
    """One of the ways to write ``value``."""
    sign = draw(st.sampled_from(["-", "\u2212", "- "])) if value < 0 else draw(st.sampled_from(["", "+"]))
    top, bottom = abs(value.numerator), value.denominator
    ways = []
    factor = draw(st.integers(1, 9))
    ways.append(f"{top * factor}/{bottom * factor}")
    ways.append(rf"\{draw(st.sampled_from(['frac', 'dfrac', 'tfrac']))}{{{top * factor}}}{{{bottom * factor}}}")
    if bottom > 1 and top > bottom:
        ways.append(f"{top // bottom} {top % bottom}/{bottom}")
        ways.append(rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    if (digits := decimal_digits(value)) is not None:
        whole, _, after = digits.partition(".")
        grouped = f"{int(whole):,}"
        tail = f".{after}" if after else ""
        ways += [digits, grouped + tail, grouped.replace(",", "{,}") + tail, grouped.replace(",", r"\,") + tail]
        ways += [f"{digits}0" if after else f"{digits}.0", f"0{digits}", f"{digits}e0"]
        if int(whole) == 0 and after:
            ways.append(tail)
        places = draw(st.integers(-5, 5))
        shifted = decimal_digits(value * Fraction(10) ** -places)
        if shifted is not None:
            power = draw(st.sampled_from([f"e{places}", rf" \times 10^{{{places}}}", f"*10^{places}"]))
            ways.append(shifted + power)
    written = sign + draw(st.sampled_from(ways))
    around = draw(st.sampled_from(["{}", "${}$", " {} ", "{}.", r"{}\%", "{}%"]))
    return around.replace("{}", written)


@settings(max_examples=300, deadline=None)
@given(st.data(), values)
def test_every_notation_of_a_number_is_that_number(data, value):
    written = data.draw(notation(value))
    assert number(written) == value
    assert final_answer(f"#### {written}") == value
    assert final_answer(rf"\boxed{{{written}}}") == value


@settings(max_examples=200, deadline=None)
@given(st.data(), values, values)
def test_notations_of_different_numbers_differ(data, value, other):
    assume(value != other)
    assert number(data.draw(notation(value))) != number(data.draw(notation(other)))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_has_an_answer(text):
    assert isinstance(final_answer(text), str | Fraction)
    assert exact_answer(None)(completions=[text], answer=[text])[0] in (0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.fractions(max_denominator=99).filter(lambda v: v >= 0))
def test_a_number_ends_a_sentence(data, value):
    written = decimal_digits(value) or f"{value.numerator}/{value.denominator}"
    assert final_answer(f"So there are 3 and 4, and the answer is {written}.") == value
