"""The built-in rules, by literals worked by hand."""

import json
import math
import sys

import pytest

from tether.errors import RewardError
from tether.rewards.answer_rules import cosine, exact_answer
from tether.rewards.function import FunctionReward
from tether.rewards.length_rules import length, overlong
from tether.rewards.rules import RULES
from tether.rewards.text_rules import distinct, format_, json_schema, regex, repetition, sentiment, text_of


def test_length():
    rule = length("4")
    assert rule(completion_ids=[[1] * 4, [1], [], [1] * 8, [1] * 10]) == [0.0, -0.75, -1.0, -1.0, -1.5]


def test_overlong():
    # 100 tokens at most, of which the last 20 cost 1/20 each
    rule = overlong("100:20")
    lengths = [0, 80, 81, 90, 99, 100, 101, 500]
    values = rule(completion_ids=[[1] * n for n in lengths])
    assert values == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1, -1])
    assert overlong("4:4")(completion_ids=[[], [1], [1] * 4]) == [0, -0.25, -1]


def test_cosine():
    rule = cosine("100:exact_answer")
    half, third = [1] * 50, [1] * 33
    right = rule(completions=["4"] * 5, completion_ids=[[], [1] * 25, half, [1] * 99, [1] * 100], answer=["4"] * 5)
    # cos(pi/4) = 0.7071, cos(pi/2) = 0, cos(0.99 pi) = -0.9995
    assert right == pytest.approx([1, 0.75 + 0.25 * 0.70711, 0.75, 0.5 + 0.25 * (1 - 0.99951), -1], abs=1e-5)
    wrong = rule(completions=["4"] * 5, completion_ids=[[], third, half, [1] * 99, [1] * 400], answer=["5"] * 5)
    # cos(0.33 pi) = 0.5090
    assert wrong == pytest.approx([-1, -0.75 - 0.25 * 0.50904, -0.75, -0.5 - 0.25 * (1 - 0.99951), -1], abs=1e-5)
    assert rule(completions=["4"], completion_ids=[half], answer=[None]) == [None]


def test_cosine_of_other_rules_and_columns():
    assert cosine("2:multiple_choice:key")(completions=["(B)"], completion_ids=[[1]], key=["B"]) == [0.75]
    assert cosine("2:exact_answer:gold")(completions=["5"], completion_ids=[[1]], gold=["4"]) == [-0.75]
    assert FunctionReward("c", cosine("2:exact_answer:gold")).needs == {"gold"}
    with pytest.raises(RewardError, match="'exact_answer' needs the column 'gold'"):
        cosine("2:exact_answer:gold")(completions=["5"], completion_ids=[[1]], answer=["4"])


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


def test_regex():
    texts = ["so \\boxed{a\nb}.", "\\boxed{", ""]
    assert regex(r"\\boxed\{.*\}")(completions=texts) == [1.0, 0.0, 0.0]
    assert regex("^a")(completions=["ab", "b\na"]) == [1.0, 0.0]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path):
    pytest.importorskip("jsonschema", reason="needs the extra json")
    file = tmp_path / "person.json"

    def written(value):
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(file)

    return written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        (' \n{"name": "Ada"}\n', 1.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": 36.5}', 0.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "x": 1}', 0.0),
        ('{"name": "Ada"', 0.0),
        ("[]", 0.0),
        ("", 0.0),
        ('Here it is: {"name": "Ada"}', 0.0),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nDone.', 1.0),
        ('```\n{"name": "Ada"}\n```', 1.0),
        ('```json\n{"name": 1}\n```\nno, rather\n```json\n{"name": "Ada"}\n```', 1.0),
        ('```json\n{"name": "Ada"}\n```\nno, rather\n```json\n{"name": 1}\n```', 0.0),
        ('```json\n{"name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('{"name": "Ada", "age": ' + "9" * 5000 + "}", 0.0),
        ("[" * 100_000, 0.0),
        ('{"name": "\\ud800"}', 1.0),
    ],
)
def test_json_schema(text, value, schema):
    assert json_schema(schema(SCHEMA))(completions=[text]) == [value]


def test_schemas_that_allow_all_or_nothing(schema):
    assert json_schema(schema(True))(completions=["[1]", "no"]) == [1.0, 0.0]
    assert json_schema(schema(False))(completions=["[1]"]) == [0.0]


def test_a_schema_is_not_fetched(schema):
    rule = json_schema(schema({"$ref": "http://127.0.0.1:9/other.json"}))
    with pytest.raises(RewardError, match=r"reward 'json_schema': its process failed on '1' \(.*Unresolvable"):
        rule(completions=["1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON schema"),
        ("[]", "not a JSON schema .a schema is an object"),
        ({"type": "nonsense"}, "not a JSON schema .'nonsense' is not valid"),
        ("[" * 100_000, "not a JSON schema"),
    ],
)
def test_files_that_hold_no_schema(content, message, schema):
    with pytest.raises(RewardError, match=f"person.json: reward 'json_schema': {message}"):
        json_schema(schema(content))


def test_a_schema_that_is_not_there(tmp_path):
    pytest.importorskip("jsonschema", reason="needs the extra json")
    with pytest.raises(RewardError, match=r"none.json: reward 'json_schema' cannot read its file \(No such file"):
        json_schema(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("rule", "module", "extra"), [("math", "math_verify", "math"), ("json_schema:s.json", "jsonschema", "json")]
)
def test_a_rule_whose_extra_is_missing_says_so_at_once(rule, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{module}.exceptions", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name, _, argument = rule.partition(":")
    with pytest.raises(RewardError, match=rf"needs the extra: pip install 'tether-rlhf\[{extra}\]'"):
        RULES[name](argument or None)


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
        ("overlong", None, "the longest length in tokens"),
        ("overlong", "100", "such as overlong:400:80"),
        ("overlong", "100:0", "such as overlong:400:80"),
        ("overlong", "100:101", "such as overlong:400:80"),
        ("cosine", None, "such as cosine:400:exact_answer"),
        ("cosine", "400", "such as cosine:400:exact_answer"),
        ("cosine", "0:exact_answer", "such as cosine:400:exact_answer"),
        ("cosine", "400:length:3", "such as cosine:400:exact_answer"),
        ("math", "answer:soon", "the seconds for a comparison after its column"),
        ("math", "answer:0", "the seconds for a comparison after its column"),
        ("math", "answer:nan", "the seconds for a comparison after its column"),
        ("json_schema", None, "needs a file with a JSON schema"),
        ("regex", None, "needs a regular expression"),
        ("regex", "(", r"'\(' is not a regular expression"),
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
