"""Multiple choice: the notations of a choice, and texts that make none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import RewardError
from tether.rewards.answer_rules import multiple_choice
from tether.rewards.choices import LETTERS, choice, letter_of


@pytest.mark.parametrize(
    "text",
    [
        "B", "b", "B.", "(B)", "(b)", "B)", "**B**", "*B*", "`B`", '"B"', " B\n", "B. Paris", "B) Paris", "(B) Paris",
        "B: Paris", "Answer: B", "answer: B", "ANSWER: B", "Answer: (B)", "Answer:\nB", "Answer: **B**",
        "**Answer:** B", "**Answer: B**", "Answer: B. Paris", "Answer = B", "the answer is B",
        "The answer is: B", "The answer is (B).",
        "The correct answer is B) Paris.", "the correct option is B", "The best choice is option B",
        "So the answer is B because A is too small.", "The answer to this question is B.", r"\boxed{B}", r"$\boxed{B}$",
        r"\boxed{(B)}", r"\boxed{\text{B}}", r"\boxed{\text{(B)}}", r"\boxed{\textbf{(B) }12}", r"\boxed{\mathrm{B}}",
        r"\boxed{B. 12}", "#### B", "so\n#### (B)", "I think that it is B.", "It must be B", "Of (A), and then (B).",
        "(A) and (C) are wrong, so (B)", "Answer: A. No: it is larger.\nAnswer: B", r"Answer: A, or rather \boxed{B}",
        "A is wrong. The answer is B", "The answer is $B$.", "Final answer: “B”", "answer is B!",
        "option A is not it; B",
    ],
)  # fmt: skip
def test_notations_of_a_choice(text):
    assert choice(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "", "A cat sat.", "I think so.", "the answer is a dog", "The answer is I think none", "Vitamin C is good",
        "K", "(K)", "AB", "Answer: AB", "Answer: Because", "A or B", "A, B", "Answer: A or B", "Answer: A, B",
        "The answer is (A) and (B).", "(A) / (B)", "Answer: A, B, or C", r"\boxed{A, B}", r"\boxed{12}", r"\boxed{AB}",
        "A. x\nB. y\nC. z", "#### A or B", "The answer is B's", "B-52",
    ],
)  # fmt: skip
def test_texts_that_choose_nothing_or_several(text):
    assert choice(text) is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ABIJKabik ()[]{}\\$*.,:#\nanswer is or and boxedtext"), max_size=60))
def test_any_text_chooses_a_letter_or_none(text):
    assert choice(text) in (None, *LETTERS)


@pytest.mark.parametrize("letter", LETTERS)
def test_every_letter(letter):
    for text in (letter, f"({letter})", f"Answer: {letter}", rf"\boxed{{{letter}}}", f"the answer is {letter}."):
        assert choice(text) == letter_of(text if len(text) < 4 else letter) == letter


def test_cells():
    cells = ["B", "b", "(B)", "B.", " B ", r"\boxed{B}", "B. Paris", 1]
    assert [letter_of(cell) for cell in cells] == ["B"] * 8
    assert [letter_of(cell) for cell in (0, 9)] == ["A", "J"]
    assert [letter_of(cell) for cell in (10, -1, 1.0, True, "1", "K", "", "AB", "A or B", ["B"])] == [None] * 10


def test_multiple_choice():
    rule = multiple_choice(None)
    assert rule(completions=["(B)", "Answer: C", "none"], answer=["B", "B", "B"]) == [1.0, 0.0, 0.0]
    assert rule(completions=["C", "C", "C"], answer=[2, None, float("nan")]) == [1.0, None, None]
    assert multiple_choice("key")(completions=["A"], key=["A"], answer=["B"]) == [1.0]
    with pytest.raises(RewardError) as caught:
        rule(completions=["A"], answer=["Paris"])
    assert str(caught.value) == (
        "reward 'multiple_choice': 'Paris' is no choice; it is a letter from A to J, or a number from 0 to 9"
    )
