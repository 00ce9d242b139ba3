"""The calculator: what it computes, what it refuses, and the problems."""

from __future__ import annotations

import pytest

from tether.environments.calculator import CalculatorEnvironment, calculate, rows
from tether.errors import EpisodeError
from tether.types import Prompt


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*7", "84"),
        (" 2 + 3*4 ", "14"),
        ("(2+3)*4", "20"),
        ("-(2-5)", "3"),
        ("1/3+1/6", "1/2"),
        ("0.1+0.2", "3/10"),
        ("1e3", "1000"),
    ],
)
def test_arithmetic_is_exact(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "2**8", "2**2**2**2**9", "7//2", "7%2", "abs(1)", "__import__('os')", "x", "'a'*3",
        "True", "1 if 1 else 2", "1if 1else 2", "12a", "1_0", "0x1f",
        "[1]", "1,2", "1==1", "1e99", "9" * 99, "10**12", "(" * 60 + "1" + ")" * 60, "1j", "lambda: 1",
        "1\n2", "\0", "1" + "+1" * 60,
    ],
)  # fmt: skip
def test_anything_else_is_an_error_and_is_not_run(expression):
    assert calculate(expression) == "error"


def test_an_episode():
    env = CalculatorEnvironment()
    env.reset(Prompt(ids=(), text="?", columns={"answer": "27"}), seed=0)
    asked = env.step("Let me see.\n3*12=")
    assert (asked.text, asked.reward, asked.done) == (" 36\n", 0.0, False)
    assert env.step("36-9= ").text == " 27\n"
    last = env.step("#### 27")
    assert (last.reward, last.done, dict(last.info)) == (1.0, True, {"right": 1.0, "calls": 2.0})


def test_a_wrong_answer_is_worth_nothing():
    env = CalculatorEnvironment()
    env.reset(Prompt(ids=(), text="?", columns={"answer": 27}), seed=0)
    assert env.step("#### 28").reward == 0.0


def test_problems_need_an_answer():
    with pytest.raises(EpisodeError, match="need a column 'answer'"):
        CalculatorEnvironment().reset(Prompt(ids=(), text="?"), seed=0)


def play(row):
    """What the environment says of the row's completion, turn by turn."""
    env = CalculatorEnvironment()
    env.reset(Prompt(ids=(), text=row["prompt"], columns={"answer": row["answer"]}), seed=0)
    first, second, answer = row["completion"].split("\n")
    written = ""
    for line in (first, second):
        turn = line.partition("=")[0] + "="
        written += turn + env.step(turn).text
    return written + answer, env.step(answer).reward


def test_solutions_are_written_as_their_episodes_and_are_right():
    for row in rows(count=100, seed=1, largest=20, right=100):
        written, reward = play(row)
        assert written == row["completion"]
        assert reward == 1.0


def test_a_share_of_the_solutions_is_wrong():
    found = [play(row)[1] for row in rows(count=400, seed=1, largest=20, right=30)]
    assert 0.2 < sum(found) / 400 < 0.42
