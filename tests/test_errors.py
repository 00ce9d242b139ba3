"""Errors are one line, ``where: message; hint``, that the code they pass through can add to."""

import copy
import pickle
import re
from pathlib import Path

import pytest

import tether
from tether.data.reading import RowError
from tether.errors import ConfigError, GuardError, TetherError

ARGUMENTS = {RowError: ("empty", "prompt is empty")}
"""What an error is made from, where it is not a message alone."""


def descendants(cls) -> list[type]:
    return [cls, *(one for inner in cls.__subclasses__() for one in descendants(inner))]


EVERY = [cls for cls in descendants(TetherError) if cls.__module__.startswith("tether.")]


def test_every_error_of_the_source_is_tested_here():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(tether.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"^class (\w+)\((?:\w+Error)\)", source, re.MULTILINE))
    assert named | {"TetherError"} == {cls.__name__ for cls in EVERY}


def passed_through(error) -> None:
    try:
        raise error
    except TetherError as passing:
        passing.at("pairs.jsonl:17")
        passing.at("pairs.jsonl")  # it is located there already
        passing.advise("shorten it")
        passing.advise("resume with 'tether resume out'")
        raise


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_is_located_and_advised_and_raised_again(cls):
    error = cls(*ARGUMENTS.get(cls, ("it failed",)))
    message = error.message
    assert str(error) == message
    with pytest.raises(cls) as caught:
        passed_through(error)
    assert caught.value is error
    assert (error.message, error.where) == (message, "pairs.jsonl:17")
    assert str(error) == f"pairs.jsonl:17: {message}; shorten it; resume with 'tether resume out'"


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_survives_a_copy_and_another_process(cls):
    error = cls(*ARGUMENTS.get(cls, ("it failed",)))
    error.at(Path("out"))
    error.advise("try again")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is cls
        assert str(other) == str(error) == f"out: {error.message}; try again"
        assert vars(other) == vars(error)


def test_where_and_hint_may_be_given_at_once_or_not_at_all():
    assert str(ConfigError("a", where="b", hint="c")) == "b: a; c"
    assert str(ConfigError("a", where="b")) == "b: a"
    assert str(ConfigError("a", hint="c")) == "a; c"


def test_the_kind_of_a_row_error_stays_with_it():
    error = RowError("empty", "prompt is empty", hint="fill it")
    assert (error.kind, str(error)) == ("empty", "prompt is empty; fill it")


def test_exit_codes():
    assert {cls.exit_code for cls in EVERY if not issubclass(cls, GuardError)} == {2}
    assert GuardError.exit_code == 3


def test_a_place_within_a_place_names_both_once():
    error = TetherError("the loss is not finite", where="sft step 4")
    error.at("rejection-sampling round 2")
    error.at("rejection-sampling round 2")
    assert str(error) == "rejection-sampling round 2: sft step 4: the loss is not finite"
