"""Python functions as rewards: where they come from, what they are given, and what they may give back."""

import asyncio
import functools
import itertools
import sys
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch

from helpers import completion
from tether.errors import RewardError
from tether.rewards.answer_rules import exact_answer
from tether.rewards.function import FunctionReward
from tether.rewards.loading import load_function
from tether.rewards.logged import NAMES
from tether.types import Prompt, RolloutGroup


def rollouts(*, columns=({}, {}), messages=None) -> list[RolloutGroup]:
    """Two prompts with two completions each; of 2, 3, 2 and 1 tokens."""
    rows = [[([5, 1], "a"), ([6, 7, 1], "b")], [([8, 9], "c"), ([10], "d")]]
    return [
        RolloutGroup(
            prompt=Prompt(ids=(0, i), text=f"p{i}", columns=columns[i], messages=messages),
            completions=tuple(completion(ids, text=text) for ids, text in group),
        )
        for i, group in enumerate(rows)
    ]


class Table:
    """As a data frame: it has keys, and iterating over it gives them."""

    def keys(self):
        return [0, 1, 2, 3]

    def __iter__(self):
        return iter(self.keys())


class Series(Table):
    """As a column of one: it has keys too, but iterating over it gives its values."""

    def tolist(self):
        return [1.0, 2.0, 3.0, 4.0]

    def __iter__(self):
        return iter(self.tolist())


def values(function, **kwargs):
    return plain(FunctionReward("mine", function).judge(rollouts(**kwargs)))


def plain(judged):
    """The values of judgements, which have no parts."""
    assert all(not judgement.parts for row in judged for judgement in row)
    return [[judgement.value for judgement in row] for row in judged]


def test_what_a_function_is_given():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        assert [columns.pop(name).__class__.__name__ for name in NAMES] == ["Progress", "method", "method"]
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [1, 2.5, -3, 0]

    assert values(reward, columns=({"answer": "x", "only": 1}, {"answer": "y"})) == [[1.0, 2.5], [-3.0, 0.0]]
    assert seen == {
        "prompts": ["p0", "p0", "p1", "p1"],
        "completions": ["a", "b", "c", "d"],
        "completion_ids": [[5, 1], [6, 7, 1], [8, 9], [10]],
        "columns": {"answer": ["x", "x", "y", "y"], "only": [1, 1, None, None]},
    }


def test_columns_that_no_prompt_of_a_step_has():
    """A step may hold no row of a task; the function is still called with the columns of the data."""
    known = FunctionReward("mine", lambda completions, answer: answer, columns=frozenset(["answer"]))
    assert plain(known.judge(rollouts())) == [[None, None], [None, None]]
    assert plain(known.judge(rollouts(columns=({"answer": 1}, {})))) == [[1.0, 1.0], [None, None]]
    with pytest.raises(RewardError, match=r"'mine' raised TypeError: .*answer"):
        values(lambda completions, answer: answer)


def test_what_a_function_needs():
    def needs(function):
        return FunctionReward("mine", function).needs

    async def later(prompts, *, task):
        return []

    class Callable:
        def __call__(self, completion_ids, level):
            return []

    assert needs(lambda prompts, completions, completion_ids, **columns: []) == frozenset()
    assert needs(lambda answer, completions, other=3: []) == {"answer"}
    assert needs(later) == {"task"}
    assert needs(Callable()) == {"level"}
    assert needs(functools.partial(lambda completions, answer, level: [], level=2)) == {"answer"}
    assert needs(exact_answer("solution")) == {"solution"}
    assert needs(exact_answer(None)) == {"answer"}
    assert needs(max) == frozenset()  # no signature


def test_a_function_gets_only_what_it_asks_for():
    assert values(lambda completions: [len(c) for c in completions]) == [[1, 1], [1, 1]]
    assert values(lambda prompts, answer: answer, columns=({"answer": 1}, {"answer": 2})) == [[1, 1], [2, 2]]


def test_conversations_come_as_messages():
    messages = ({"role": "user", "content": "hi"},)

    def reward(prompts, completions):
        assert prompts == [list(messages)] * 4
        return [float(c == [{"role": "assistant", "content": "a"}]) for c in completions]

    assert values(reward, messages=messages) == [[1.0, 0.0], [0.0, 0.0]]


async def later(completions, **_):
    await asyncio.sleep(0)
    return [float(ord(c)) for c in completions]


def test_async():
    assert values(later) == [[97.0, 98.0], [99.0, 100.0]]


def test_async_inside_a_running_loop():
    """As in a notebook."""

    async def notebook():
        return values(later)

    assert asyncio.run(notebook()) == [[97.0, 98.0], [99.0, 100.0]]


def test_async_that_raises():
    async def reward(completions):
        raise KeyError("lost")

    with pytest.raises(RewardError, match=r"'mine' raised KeyError: 'lost' \(test_functions.py:\d+\)"):
        values(reward)


@pytest.mark.parametrize(
    "returned",
    [
        [None, 1, True, 2.0],
        (None, 1, True, 2.0),
        iter([None, 1, True, 2.0]),
        [None, np.float32(1), np.bool_(True), torch.tensor(2.0)],
    ],
)
def test_numbers_of_every_kind_and_none(returned):
    assert values(lambda completions: returned) == [[None, 1.0], [1.0, 2.0]]


def test_a_column_of_numbers_is_a_list_of_values():
    assert values(lambda completions: Series()) == [[1.0, 2.0], [3.0, 4.0]]
    assert values(lambda completions: dict.fromkeys("abcd", 1).values()) == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("returned", [np.arange(4), torch.arange(4.0, requires_grad=True)])
def test_arrays(returned):
    assert values(lambda completions: returned) == [[0.0, 1.0], [2.0, 3.0]]


def test_one_reward_per_token():
    found = values(lambda completion_ids: [[0.5] * len(ids) for ids in completion_ids[:3]] + [torch.tensor([2.0])])
    assert found == [[(0.5, 0.5), (0.5, 0.5, 0.5)], [(0.5, 0.5), (2.0,)]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2, 3], "'mine' returned 3 values for 4 completions"),
        ([], "'mine' returned 0 values for 4 completions"),
        (itertools.repeat(1.0), "'mine' returned more than 4 values for 4 completions"),
        (1.0, "'mine' must return a list of values; it returned float"),
        (None, "'mine' must return a list of values; it returned NoneType"),
        ([1, float("nan"), 1, 1], "'mine' returned nan for completion 1; a reward must be finite"),
        ([1, 1, float("-inf"), 1], "'mine' returned -inf for completion 2"),
        ([1, 1, 1, torch.tensor(float("nan"))], "'mine' returned nan for completion 3"),
        ([1, -(10**400), 1, 1], "'mine' returned -10+ for completion 1; a reward must be finite"),
        ([1, 10**5000, 1, 1], "'mine' returned <int> for completion 1; a reward must be finite"),
        ([1, "2", 1, 1], "'mine' returned '2' for completion 1; it must be a number or None"),
        ("abcd", "'mine' must return a list of values; it returned str"),
        (b"abcd", "'mine' must return a list of values; it returned bytes"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "'mine' must return a list of values; it returned dict"),
        ({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, "'mine' must return a list of values; it returned dict"),
        (OrderedDict.fromkeys(range(4), 1.0), "'mine' must return a list of values; it returned OrderedDict"),
        (UserDict(dict.fromkeys(range(4), 1.0)), "'mine' must return a list of values; it returned UserDict"),
        ({1, 2, 3, 4}, "'mine' must return a list of values; it returned set"),
        (frozenset([1, 2, 3, 4]), "'mine' must return a list of values; it returned frozenset"),
        (Table(), "'mine' must return a list of values; it returned Table"),
        ([1, {"score": 2}, 1, 1], "'mine' returned {'score': 2} for completion 1"),
        ([1, [1, 2], 1, 1], "'mine' returned 2 token rewards for completion 1, which has 3 tokens"),
        ([[1, float("inf")], 1, 1, 1], "'mine' returned inf for completion 0"),
        ([[1, None], 1, 1, 1], "'mine' returned None for completion 0"),
    ],
)
def test_what_a_function_may_not_give_back(returned, message):
    with pytest.raises(RewardError, match=message):
        values(lambda completions: returned)


def test_an_error_without_words_is_named():
    class SpeechlessError(Exception):
        def __str__(self):
            raise ValueError

    def reward(completions):
        raise SpeechlessError

    with pytest.raises(
        RewardError, match=r"'mine' raised SpeechlessError: <SpeechlessError> \(test_functions.py:\d+\)"
    ):
        values(reward)


def test_a_function_that_raises_says_where():
    def reward(completions):
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError: .* \(test_functions.py:\d+\)") as caught:
        values(reward)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match=r"missing 1 required positional argument: 'solution'"):
        values(lambda completions, solution: [0] * 4)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_from_a_file(folder):
    (folder / "some rewards.py").write_text("def long(completions):\n    return [len(c) for c in completions]\n")
    for spec in ("some rewards.py:long", f"{folder}/some rewards.py:long"):
        reward = load_function(spec)
        assert reward.name == "long"
        assert plain(reward.judge(rollouts())) == [[1.0, 1.0], [1.0, 1.0]]


def test_a_file_may_import_its_neighbours(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "neighbour_of_rewards.py").write_text("VALUE = 7\n")
    (folder / "sub" / "rewards.py").write_text(
        "from neighbour_of_rewards import VALUE\n\ndef seven(completions):\n    return [VALUE for _ in completions]\n"
    )
    assert plain(load_function("sub/rewards.py:seven").judge(rollouts())) == [[7.0, 7.0], [7.0, 7.0]]


def test_from_a_module_in_the_working_directory(folder):
    (folder / "reward_package").mkdir()
    (folder / "reward_package" / "inner.py").write_text("async def one(completions):\n    return [1] * 4\n")
    assert plain(load_function("reward_package.inner:one").judge(rollouts())) == [[1.0, 1.0], [1.0, 1.0]]


def test_from_an_installed_module():
    assert load_function("tether.rewards.text_rules:text_of").name == "text_of"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.py:f", r"missing.py: no such file to import"),
        ("no_such_module_here:f", "no rule has this name, and there is no module 'no_such_module_here'"),
        ("tether.nonesuch:f", "there is no module 'tether.nonesuch' to take 'f' from"),
        ("good.py:nonesuch", "good.py has no function 'nonesuch'; it has first, second"),
        ("good.py:NUMBER", "good.py has no function 'NUMBER'"),
        ("good.py:", "good.py has no function ''"),
        ("syntax.py:f", r"importing it raised SyntaxError: .*syntax.py, line 1"),
        ("raises.py:f", r"importing it raised RuntimeError: at import \(raises.py:2\)"),
        ("imports.py:f", "importing it raised ModuleNotFoundError: No module named 'nonesuch_dependency'"),
    ],
)
def test_functions_that_cannot_be_loaded(folder, spec, message):
    (folder / "good.py").write_text("NUMBER = 1\ndef first(): ...\ndef second(): ...\ndef _hidden(): ...\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "raises.py").write_text("\nraise RuntimeError('at import')\n")
    (folder / "imports.py").write_text("import nonesuch_dependency\n")
    with pytest.raises(RewardError, match=message) as caught:
        load_function(spec)
    assert "\n" not in str(caught.value)
