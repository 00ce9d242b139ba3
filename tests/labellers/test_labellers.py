"""Labellers: what each form is given and answers, and that a failure is an error and never a label."""

from __future__ import annotations

import json
import math
import sys

import pytest

from helpers import completion
from tether.annotator import bradley_terry
from tether.errors import RewardError
from tether.labellers.function import FunctionLabeller
from tether.labellers.labels import Pair, pairs_of, preferences
from tether.labellers.program import ProgramLabeller
from tether.labellers.scores import GoldLabeller
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.types import Message, Prompt, RolloutGroup

PROMPT = Prompt(ids=(0, 5), text="p")


def pair(first, second, prompt=PROMPT):
    return Pair(prompt=prompt, first=completion([6, 1], text=first), second=completion([7, 1], text=second))


PAIRS = [pair(" a", " bb"), pair(" ccc", " d"), pair(" e", " f")]


def shorter(prompts, first, second):
    return ["first" if len(a) < len(b) else "second" if len(b) < len(a) else "tie" for a, b in zip(first, second)]  # noqa: B905


def gold(function, **more):
    score = WeightedSum(((FunctionReward("gold", function), 1.0),))
    return GoldLabeller(name="gold:g", score=score, seed=0, **more)


def program(code, **more):
    return ProgramLabeller(name="command:x", arguments=(sys.executable, "-S", "-c", code), **more)


def length(completions, **_):
    return [float(len(text)) for text in completions]


def test_completions_are_paired_in_order_and_blank_or_equal_ones_left_out():
    texts = (" a", " b", " c", " c", " ", " d")
    group = RolloutGroup(prompt=PROMPT, completions=tuple(completion([6, 1], text=text) for text in texts))
    assert [(one.first.text, one.second.text) for one in pairs_of([group])] == [(" a", " b")]


def test_rows_state_who_said_so_and_ties_and_skips_have_none():
    rows = list(preferences(PAIRS, ["second", "skip", "tie"], name="x"))
    assert rows == [{"prompt": "p", "chosen": " bb", "rejected": " a", "labeller": "x"}]


def test_a_conversation_stays_one():
    turns: tuple[Message, ...] = ({"role": "user", "content": "p"},)
    one = pair("a", "b", Prompt(ids=(0, 5), text="p", messages=turns))
    (row,) = preferences([one], ["first"], name="x")
    assert row["prompt"] == list(turns)
    assert row["chosen"] == [{"role": "assistant", "content": "a"}]


def test_a_function():
    assert FunctionLabeller(name="f", function=shorter).label(PAIRS) == ["first", "second", "tie"]


def test_an_async_function():
    async def later(first, **_):
        return ["skip"] * len(first)

    assert FunctionLabeller(name="f", function=later).label(PAIRS) == ["skip"] * 3


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (["first"], "1 labels for 3 pairs"),
        (["first"] * 4, "4 labels for 3 pairs"),
        (["first", "first", "A"], "'A' for pair 2; a label is first, second, tie, skip"),
        (["first", None, "tie"], "None for pair 1"),
        (["first", ["first"], "tie"], "for pair 1"),
        ("first", "returned str, not a list"),
        (3, "raised TypeError"),
    ],
)
def test_what_is_no_label_is_an_error(returned, said):
    with pytest.raises(RewardError, match=said):
        FunctionLabeller(name="f", function=lambda **_: returned).label(PAIRS)


def test_a_function_that_raises_is_an_error():
    with pytest.raises(RewardError, match=r"labeller 'f' raised ZeroDivisionError.*test_labellers\.py"):
        FunctionLabeller(name="f", function=lambda **_: 1 / 0).label(PAIRS)


ANSWERS = "import sys, json\nrows = [json.loads(line) for line in sys.stdin]\n"


def test_a_program_reads_pairs_and_answers_in_any_order():
    label = "'tie' if r['second'] == ' d' else 'first'"
    code = f"{ANSWERS}for r in rows[::-1]: print(json.dumps({{'id': r['id'], 'label': {label}}}))"
    assert program(code).label(PAIRS) == ["first", "tie", "first"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no \\x1b luck')", r"status 1: no \\u001b luck"),
        ("", "no label for 3 pairs, such as id 0"),
        ("print('hello')", "line 1 of labeller 'command:x': is no object"),
        ("print('[1]')", "is no object"),
        ('print(\'{"id": 3, "label": "tie"}\')', "has the id 3, which no pair has"),
        ('print(\'{"id": true, "label": "tie"}\')', "has the id True"),
        ('print(\'{"id": 0, "label": "tie"}\\n\' * 2)', "id 0 for the second time"),
        (f"{ANSWERS}for r in rows: print(json.dumps({{'id': r['id'], 'label': 1}}))", "1 for pair 0"),
        ("import time; time.sleep(60)", "labeller 'command:x' did not return within 0.5 s"),
    ],
)
def test_a_program_that_fails_is_an_error(code, said):
    with pytest.raises(RewardError, match=said):
        program(code, deadline=0.5 if "sleep" in code else 30.0).label(PAIRS)


def test_a_program_that_is_not_there():
    with pytest.raises(RewardError, match="cannot be started"):
        ProgramLabeller(name="command:x", arguments=("/no/such/program",)).label(PAIRS)


def test_gold_prefers_the_higher_reward_and_equal_ones_tie():
    assert gold(length).label(PAIRS) == ["second", "first", "tie"]
    assert gold(length, noise=1.0).label(PAIRS) == ["first", "second", "tie"]


def test_gold_skips_where_its_reward_does_not_apply():
    assert gold(lambda completions, **_: [None if text == " d" else 1.0 for text in completions]).label(PAIRS) == [
        "tie",
        "skip",
        "tie",
    ]


def test_gold_prefers_as_often_as_the_equations_say():
    """P(longer) = sigmoid(1 / 0.5) = 0.8808, and with 10% turned around 0.8808 * 0.9 + 0.1192 * 0.1 = 0.8046."""
    many = [pair(" bb", " a")] * 4000
    for noise, expected in ((0.0, 0.8808), (0.1, 0.8046)):
        share = gold(length, temperature=0.5, noise=noise).label(many).count("first") / len(many)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(many)))


def test_gold_says_the_same_when_asked_again_and_something_else_with_another_seed():
    many = [pair(" bb", " a")] * 50
    first = gold(length, temperature=1.0)
    assert first.label(many) == first.label(many)
    other = GoldLabeller(name="g", score=first.score, seed=1, temperature=1.0)
    assert first.label(many) != other.label(many)


def test_bradley_terry_by_hand():
    assert bradley_terry(0.0) == 0.5
    assert bradley_terry(2.0) == pytest.approx(0.880797)
    assert bradley_terry(-2.0) == pytest.approx(0.119203)
    assert (bradley_terry(1e6), bradley_terry(-1e6)) == (1.0, 0.0)


def test_a_program_is_given_json_of_each_pair(tmp_path):
    file = tmp_path / "seen"
    code = f"import sys; open({str(file)!r}, 'w').write(sys.stdin.read()); sys.exit(1)"
    with pytest.raises(RewardError, match="no message"):
        program(code).label(PAIRS[:1])
    assert json.loads(file.read_text()) == {"id": 0, "prompt": "p", "first": " a", "second": " bb"}


def test_a_completion_is_no_argument_of_the_program(tmp_path):
    text = f" $(touch {tmp_path}/run); touch {tmp_path}/run"
    code = f"{ANSWERS}assert sys.argv == ['-c']\nprint(json.dumps({{'id': 0, 'label': 'first'}}))"
    assert program(code).label([pair(text, " b")]) == ["first"]
    assert not (tmp_path / "run").exists()
