"""The rule ``math``: which answers math-verify shows to be equal, in a process that is killed where one hangs."""

import random
import time

import pytest
from benchmarks.gsm8k_answers import HANGING, MALFORMED, NOTATIONS, numbers_of, perturbed

from helpers import completion
from tether.errors import RewardError
from tether.rewards.answer_rules import LONGEST, against_column, cosine, end_of, exact_answer, in_latex, math_
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum
from tether.rewards.function import FunctionReward
from tether.types import Prompt, RolloutGroup

pytest.importorskip("math_verify", reason="needs the extra math")


@pytest.fixture(scope="module")
def rule():
    """One for all tests, so that its process starts once."""
    return math_(None)


EQUAL = {
    "72": [
        r"\boxed{72}", "#### 72", "72", "so it is 72.", "it is $72$", r"\[72\]", r"$\boxed{72}$.", "**72**",
        "Answer: 72",
        r"\boxed{72.0}", r"\boxed{x=72}", "x = 72", r"\boxed{\text{72}}", r"\boxed{\$72}", r"\boxed{72\%}",
        r"\boxed{8 \cdot 9}",
        r"\boxed{72 \text{ cm}}", r"\boxed{72\text{ clips}}", r"\boxed{72\,\mathrm{km}}", r"\boxed{\frac{144}{2}}",
        r"\boxed{7.2e1}",
        r"\boxed{1} or rather \boxed{72}", "first 5, then 72 apples", r"it costs \$72.", r"\boxed{\sqrt{5184}}",
    ],
    "1/2": ["0.5", r"\boxed{\frac12}", r"\boxed{\frac{2}{4}}", r"\boxed{2^{-1}}", r"\boxed{\sin(\pi/6)}", "50%"],
    "1/3": [r"\boxed{0.333333}", r"\boxed{\frac{2}{6}}"],
    "1 1/2": [r"\boxed{1.5}", r"\boxed{1\frac12}", "3/2"],
    "1500": ["1,500", r"\boxed{1{,}500}", "1.5e3", r"\boxed{1.5 \times 10^3}", "1\u202f500"],
    "-5": [r"\boxed{-5}", "\u22125", r"\boxed{-\sqrt{25}}"],
    r"2\sqrt{2}": [r"\boxed{\sqrt{8}}", r"$2^{3/2}$", r"\boxed{2.828427}"],
    "x^2+1": [r"\boxed{1+x^2}", "so $x^2+1$.", r"\boxed{\frac{2x^2+2}{2}}"],
    "$x^2+1$": [r"\boxed{1+x^2}"],
    r"so \boxed{x+1}": [r"\boxed{1+x}"],
    "[1,2)": [r"\boxed{[1,2)}", r"$[1,\frac{4}{2})$"],
    r"(-\infty,3]\cup[5,\infty)": [r"\boxed{[5,\infty)\cup(-\infty,3]}"],
    r"\{1,2\}": [r"\boxed{\{2,1\}}", r"\boxed{1,2}", "$x=1$ or $x=2$"],
    "(3,4)": [r"\boxed{(3,4)}"],
    "12 cm": [r"\boxed{12}", r"\boxed{12\text{ cm}}", r"\boxed{12 cm}"],
    r"5\pi\text{ cm}^2": [r"\boxed{5\pi}"],
    r"90^\circ": [r"\boxed{90}"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"],
    "Paris": [r"\boxed{Paris}", r"\boxed{\text{Paris}}", "#### Paris"],
}  # fmt: skip
DIFFERENT = {
    "72": [
        "", "nothing", r"\boxed{73}", r"\boxed{-72}", r"\boxed{7.2}", r"\boxed{72", r"\boxed{72x}", "72 or 73",
        r"\boxed{72} \boxed{1}",
        r"\boxed{9^{9}}", r"\boxed{\text{seventy-two}}", r"\boxed{0.72}", r"\boxed{720}",
    ],
    "1/2": [r"\boxed{0.49}", r"\boxed{\frac{2}{1}}", r"\boxed{1}", r"\boxed{x}"],
    "1/3": [r"\boxed{0.33}"],
    "0.0000001": [r"\boxed{0.0000002}", r"\boxed{\frac{2}{10000000}}"],  # one number to six places
    "1": [r"\boxed{1 1/2}"],  # which math-verify alone reads as 1
    "234": ["1\u202f234"],
    "x^2+1": [r"\boxed{x^2+2}", r"\boxed{x^2}", r"\boxed{y^2+1}", r"\boxed{2}"],
    "[1,2)": [r"\boxed{(1,2)}", r"\boxed{[1,2]}", r"\boxed{[1,3)}"],
    r"\{1,2\}": [r"\boxed{\{1,3\}}", r"\boxed{\{1\}}"],
    "(3,4)": [r"\boxed{(4,3)}"],
    "12 cm": [r"\boxed{13\text{ cm}}"],
    "listen": [r"\boxed{silent}"],  # the same letters, so the same product
}  # fmt: skip
pairs = [(gold, text, 1.0) for gold, texts in EQUAL.items() for text in texts]
pairs += [(gold, text, 0.0) for gold, texts in DIFFERENT.items() for text in texts]


@pytest.mark.parametrize(("gold", "text", "value"), pairs)
def test_answers(gold, text, value, rule):
    assert rule(completions=[text], answer=[gold]) == [value]


@pytest.mark.parametrize("gold", [72, 72.0, "72", "$72$", r"\boxed{72}", "so 1 + 71\n#### 72"])
def test_cells_of_any_type(gold, rule):
    assert rule(completions=["it is 72", "it is 73", [{"role": "assistant", "content": "72"}]], answer=[gold] * 3) == [
        1,
        0,
        1,
    ]


def test_rows_without_an_answer(rule):
    assert rule(completions=["4", "4"], answer=[None, float("nan")]) == [None, None]


def test_columns_and_seconds():
    assert (against_column(math_("gold")).column, math_("gold").grading.grader.deadline) == ("gold", 5.0)
    assert (math_("gold:0.5").column, math_("gold:0.5").grading.grader.deadline) == ("gold", 0.5)
    assert FunctionReward("m", math_("gold:0.5")).needs == {"gold"}
    scaled = cosine("400:math:gold:2")
    assert (scaled.answer.rule, scaled.answer.column, scaled.answer.grading.grader.deadline) == ("math", "gold", 2.0)


# -- what a comparison may cost -------------------------------------------------------------------------------------


def test_an_expression_that_hangs_costs_its_deadline_and_no_more():
    rule = math_("answer:1.2")
    assert rule(completions=[r"\boxed{x}"], answer=["72"]) == [0.0]
    texts = [rf"\boxed{{{HANGING[0]}}}", r"\boxed{\frac{144}{2}}", rf"so it is ${HANGING[3]}$", r"\boxed{70+2}"]
    started = time.monotonic()
    assert rule(completions=texts, answer=["72"] * 4) == [0.0, 1.0, 0.0, 1.0]
    assert 2.4 <= time.monotonic() - started < 12  # on a busy machine too


@pytest.mark.slow
@pytest.mark.parametrize("expression", HANGING)
def test_expressions_that_hang(expression):
    rule = math_("answer:1.2")
    assert rule(completions=[rf"\boxed{{{expression}}}", r"\boxed{70+2}"], answer=["72"] * 2) == [0.0, 1.0]


def test_malformed_answers_neither_crash_nor_hang(rule):
    started = time.monotonic()
    assert rule(completions=list(MALFORMED), answer=["72"] * len(MALFORMED)) == [0.0] * len(MALFORMED)
    assert time.monotonic() - started < 5.0
    assert rule(completions=[r"\boxed{70+2}"], answer=["72"]) == [1.0]
    assert exact_answer(None)(completions=list(MALFORMED), answer=["72"] * len(MALFORMED)) == [0.0] * len(MALFORMED)


def test_only_so_much_is_read(rule):
    assert rule(
        completions=["$2$ " * 3000 + "\nso $70+2$", r"\boxed{" + "1+" * 1000 + "1}"], answer=["72", "1001"]
    ) == [1, 0]
    text = "a" * LONGEST + "\nso $1$"
    assert end_of(text) == "so $1$"
    assert len(end_of("a" * 3000)) == LONGEST


def test_forms_that_are_read_as_meant():
    assert in_latex("1 1/2") == r"\boxed{\frac{3}{2}}"
    assert in_latex("1.5e3") == r"\boxed{1500}"
    assert in_latex(" 0.333333 ") == r"\boxed{0.333333}"
    assert in_latex("50%") == r"\boxed{50%}"
    assert in_latex("New York") == r"\boxed{\text{New York}}"
    assert in_latex("xy") == r"\boxed{xy}"
    assert in_latex("it is $x$") == "it is $x$"


# -- gold answers that cannot be compared with ----------------------------------------------------------------------


@pytest.mark.parametrize("gold", [r"\frac{1}{}", "", "a = ", ")("])
def test_a_gold_answer_that_cannot_be_parsed_is_an_error(gold, rule):
    with pytest.raises(RewardError) as caught:
        rule(completions=["5"], answer=[gold])
    assert str(caught.value) == (
        f"reward 'math' cannot parse the answer {gold.strip()!r}; "
        "correct it, or leave it empty, so that the reward does not apply to the row"
    )


def test_it_is_found_before_the_run(rule):
    rows = [Prompt(ids=(0,), text=f"What is {i}?", columns={"answer": a}) for i, a in enumerate(["1", None, "x^", "2"])]
    reward = WeightedSum(((FunctionReward("m", rule), 1.0),))
    with pytest.raises(
        RewardError, match=r"^p.jsonl: prompt 3 \('What is 2\?'\): reward 'math' cannot parse the answer 'x\^'; "
    ):
        prepared(reward, {"p.jsonl": rows}, max_new_tokens=4)
    with pytest.raises(RewardError, match="reads answers of up to 2000 characters, and this has 3000"):
        rule(completions=["1"], answer=["x" * 3000])


def test_numbers_need_no_process():
    rule = math_(None)
    rows = [Prompt(ids=(0,), text="p", columns={"answer": "#### 1,234"})]
    prepared(WeightedSum(((FunctionReward("m", rule), 1.0),)), {"p": rows}, max_new_tokens=4)
    assert rule(completions=["#### 1234"], answer=["1,234"]) == [1.0]
    assert rule.grading.grader._process is None


def test_in_a_scorer(rule):
    group = RolloutGroup(
        prompt=Prompt(ids=(0,), text="p", columns={"answer": r"\frac{1}{2}"}),
        completions=(completion([6, 1], text=r"\boxed{\cos(\pi/3)}"), completion([6, 1], text="2")),
    )
    (scored,) = WeightedSum(((FunctionReward("m", rule), 2.0),)).score([group])
    assert [score.total for score in scored.scores] == [2.0, 0.0]


# -- school problems ------------------------------------------------------------------------------------------------


def test_school_problems_in_all_notations(shared_data, rule):
    """A sample; ``python -m benchmarks.gsm8k_answers`` does all."""
    chosen = random.Random(0).sample(numbers_of(shared_data / "gsm8k" / "test.jsonl"), 40)
    for answer, number in chosen:
        for grade in (rule, exact_answer(None)):
            said = [write(number) for write in NOTATIONS.values()]
            assert grade(completions=said, answer=[answer] * len(said)) == [1.0] * len(said), number
    wrong = [write(perturbed(n, i)) for i, (_, n) in enumerate(chosen) for write in list(NOTATIONS.values())[:3]]
    golds = [answer for answer, _ in chosen for _ in range(3)]
    assert rule(completions=wrong, answer=golds) == [0.0] * len(wrong)
    assert exact_answer(None)(completions=wrong, answer=golds) == [0.0] * len(wrong)
