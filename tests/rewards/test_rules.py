"""The built-in rules, by literals worked by hand."""

import json
import math

import pytest

from tether.errors import RewardError
from tether.rewards.rules import RULES, distinct, exact_answer, format_, length, repetition, sentiment, text_of


def test_length():
    rule = length("4")
    assert rule(completion_ids=[[1] * 4, [1], [], [1] * 8, [1] * 10]) == [0.0, -0.75, -1.0, -1.0, -1.5]


def test_repetition():
    # trigrams of "a b c a b c": abc bca cab abc: 3 distinct of 4; bigrams: ab bc ca ab bc: 3 of 5
    texts = ["a b c a b c", "A b c a B c", "one two three four", "word " * 6, "", "two words"]
    assert repetition(None)(completions=texts) == [-0.25, -0.25, 0.0, -0.75, 0.0, 0.0]
    assert repetition("2")(completions=texts[:1]) == [pytest.approx(-0.4)]
    assert repetition("1")(completions=["a a a a"]) == [-0.75]


def test_distinct():
    assert distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert distinct("a", 2) == 1.0


def test_format():
    rule = format_("<think>.*</think>.*")
    texts = ["<think>a\nb</think> c", " \n<think></think>\n", "well, <think>a</think>", "<think>a"]
    assert rule(completions=texts) == [1.0, 1.0, 0.0, 0.0]
    assert format_(r"\d+")(completions=["12", "12 or 13"]) == [1.0, 0.0]


def test_conversational_completions():
    turn = [{"role": "assistant", "content": "12"}]
    assert text_of(turn) == text_of("12") == "12"
    assert format_(r"\d+")(completions=[turn]) == [1.0]


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    texts = ["VADER is smart, handsome, and funny.", "", "The book was bad."]
    # VADER's normalisation of a sum s of ratings is s / sqrt(s^2 + 15); "bad" is rated -2.5
    bad = -2.5 / math.sqrt(2.5**2 + 15)
    positive = sentiment(None)(completions=texts)
    assert positive[0] > 0.8
    assert positive[1:] == [0.0, pytest.approx(bad, abs=1e-4)]
    assert sentiment("positive")(completions=texts) == positive
    assert sentiment("negative")(completions=texts) == [-score for score in positive]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("6 * 12 = 72\n#### 72", "He has 6 dozen.\n#### 72", True),
        ("#### 72", "72", True),
        ("so it is 72", "72", True),
        ("so it is 72.", 72, True),
        ("so it is 72.0", "72", True),
        ("#### 1,234.50", "1234.5", True),
        ("#### $18", "18", True),
        ("#### 18.", "18", True),
        ("it costs $18.", "$18", True),
        ("a half, .5", "0.5", True),
        ("-3", "-3", True),
        ("-3", "3", False),
        ("#### 72\n\nQuestion: what is 1 + 1?", "72", True),  # a base model that went on
        ("#### 72 and #### 73", "72", False),  # the last one counts
        ("72 #### 73", "72", False),
        ("#### 72 clips", "72", False),  # not a number, so compared as text
        ("####", "72", False),
        ("#### ", "72", False),
        (r"thus \boxed{72}, as asked in 2024", "72", True),
        (r"\boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{3}{2}", False),
        (r"\boxed{2\pi}", "2", False),
        (r"\boxed{50\%}", "50", True),
        (r"an unclosed \boxed{72", "72", True),
        ("1/2", "3/2", False),
        ("x = 3/2", "1.5", True),
        ("the answer is Paris", "Paris", False),
        (" paris ", "Paris", True),
        ("#### Paris", "paris", True),
        ("nothing", "72", False),
        ("", "72", False),
        ("1, 2", "2", True),
    ],
)
def test_exact_answer(completion, answer, right):
    assert exact_answer(None)(completions=[completion], answer=[answer]) == [float(right)]


def test_exact_answer_from_another_column():
    rule = exact_answer("solution")
    assert rule(completions=["4", "5"], solution=["4", "4"], answer=["5", "5"]) == [1.0, 0.0]
    with pytest.raises(RewardError, match="'exact_answer' needs the column 'solution' in the prompts"):
        rule(completions=["4"], answer=["4"])


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_row_without_an_answer_does_not_apply(nothing):
    assert exact_answer(None)(completions=["4", "None", "nan"], answer=["4", nothing, nothing]) == [1.0, None, None]


def test_exact_answer_on_school_problems(shared_data):
    """Every reference solution is right by its own answer, and by the number alone."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    numbers = [answer.rsplit("####", 1)[1].strip() for answer in answers]
    rule = exact_answer(None)
    assert rule(completions=answers, answer=answers) == [1.0] * len(rows)
    assert rule(completions=[f"So the answer is {n}." for n in numbers], answer=answers) == [1.0] * len(rows)
    shifted = numbers[1:] + numbers[:1]
    assert sum(rule(completions=shifted, answer=answers)) < 0.1 * len(rows)


@pytest.mark.parametrize(
    ("rule", "argument", "message"),
    [
        ("length", None, "a target in tokens, such as length:40"),
        ("length", "0", "a target in tokens"),
        ("length", "-3", "a target in tokens"),
        ("length", "long", "a target in tokens"),
        ("length", "²", "a target in tokens"),
        ("length", "9" * 5000, "a target in tokens"),
        ("repetition", "0", "the length of its word n-grams"),
        ("repetition", "x", "the length of its word n-grams"),
        ("format", None, "needs a regular expression"),
        ("format", "(", r"'\(' is not a regular expression"),
        ("format", "a{99999999999}", "is not a regular expression"),
        ("format", "(" * 5000, "is not a regular expression"),
        ("sentiment", "mixed", "takes 'positive' or 'negative', not 'mixed'"),
    ],
)
def test_wrong_arguments(rule, argument, message):
    with pytest.raises(RewardError, match=message):
        RULES[rule](argument)
