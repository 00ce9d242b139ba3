"""Errors of options name the field and the value: every check of every class, and every field's type."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

import tether
from tether.config import EvaluationOptions, PromptOptions, RunOptions, Steps
from tether.errors import ConfigError, with_values
from tether.types import Budget, Sampling

SRC = Path(tether.__file__).parent
NEEDED = {"out": "o", "prompts": "p", "reward": ("length:1",), "model": "base", "pairs": "p", "data": "d"}
"""Values of the fields that have no default."""


def made(cls: type) -> object:
    """An instance, with its checks."""
    given = {entry.name: NEEDED[entry.name] for entry in dataclasses.fields(cls) if required(entry)}
    if cls is PromptOptions:  # which needs a reward or an environment
        given["reward"] = NEEDED["reward"]
    return cls(**given)


def required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def checks() -> list[tuple[str, str, str]]:
    """Module, class and message of every literal check in the source."""
    found = []
    for path in sorted(SRC.rglob("*.py")):
        module = ".".join(path.relative_to(SRC.parent).with_suffix("").parts)
        for cls in [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]:
            post_init = next((one for one in cls.body if getattr(one, "name", "") == "__post_init__"), None)
            if post_init is None or "unless" not in ast.unparse(post_init):
                continue
            for table in [node for node in ast.walk(post_init) if isinstance(node, ast.Dict)]:
                keys = [key.value for key in table.keys if isinstance(key, ast.Constant)]
                found += [(module, cls.name, key) for key in keys if isinstance(key, str) and " " in key]
    return found


CHECKS = checks()


def test_the_checks_are_found():
    assert ("tether.algorithms.grpo", "Config", "kl_coef must be 0 or more") in CHECKS
    assert len(CHECKS) > 50


@pytest.mark.parametrize(("module", "cls", "message"), CHECKS, ids=[f"{m}.{c}: {text}" for m, c, text in CHECKS])
def test_every_check_names_a_field_and_so_its_value(module, cls, message):
    cls = getattr(importlib.import_module(module), cls)
    options = object.__new__(cls)
    for entry in dataclasses.fields(cls):
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        object.__setattr__(options, entry.name, NEEDED.get(entry.name) if required(entry) else default)
    # one about which flags go together needs no values
    assert ", found " in with_values(message, options) or "--" in message


CONFIGS = [
    *(getattr(tether, name).Config for name in ("sft", "reward_model", "rejection_sampling", "ppo", "grpo")),
    tether.Optim,
    tether.Surrogate,
    Sampling,
    Budget,
    RunOptions,
    PromptOptions,
    EvaluationOptions,
    Steps,
]
FIELDS = [(cls, entry.name) for cls in CONFIGS for entry in dataclasses.fields(cls)]


@pytest.mark.parametrize(
    ("cls", "name"), FIELDS, ids=[f"{cls.__module__}.{cls.__name__}.{name}" for cls, name in FIELDS]
)
def test_a_value_of_another_type_is_named_with_its_field(cls, name):
    good = made(cls)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(good, **{name: 1j})
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(", found 1j")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tether.grpo.Config(kl_coef=-1), "kl_coef must be 0 or more, found -1"),
        (lambda: tether.grpo.Config(kl_coef="0.1"), "kl_coef must be a number, found '0.1'"),
        (lambda: tether.grpo.Config(kl_units="rewards"), "kl_units must be reward or advantage, found 'rewards'"),
        (lambda: tether.grpo.Config(group_size=2.5), "group_size must be an integer, found 2.5"),
        (lambda: tether.grpo.Config(group_size=True), "group_size must be an integer, found True"),
        (lambda: tether.grpo.Config(optim=None), "optim must be an Optim, found None"),
        (
            lambda: tether.grpo.Config(group_size=1),
            "group_size must be at least 2, found 1: GRPO compares a prompt's completions with each other",
        ),
        (
            lambda: Sampling(max_new_tokens=3, min_new_tokens=4),
            "min_new_tokens must lie in 0..max_new_tokens, found min_new_tokens 4, max_new_tokens 3",
        ),
        (
            lambda: tether.ppo.Config(sampling=Sampling(temperature=0)),
            "temperature must be above 0, found 0: PPO learns from sampled tokens",
        ),
        (
            lambda: tether.Surrogate(clip_dual=1.1),
            "clip_dual must be at least 1 + clip_high, found clip_dual 1.1, clip_high 0.2",
        ),
        (
            lambda: tether.grpo.Config(group_size=4, pass_at_k=4),
            "pass_at_k must lie in 1..group_size - 1, found pass_at_k 4, group_size 4",
        ),
        (lambda: Sampling(stop=("", "a")), "stop strings must not be empty, found ('', 'a')"),
        (lambda: Sampling(stop="a"), "stop must be a list, each item text, found 'a'"),
        (lambda: tether.Optim(learning_rate=0.0), "learning_rate must be positive, found 0.0"),
        (lambda: tether.ppo.Config(target_kl="x"), "target_kl must be a number or None, found 'x'"),
    ],
)
def test_in_words(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_a_notebook_shows_one_line_after_what_foreign_code_raised():
    assert ConfigError("a", hint="b")._render_traceback_() == ["ConfigError: a; b"]
    try:
        try:
            _ = 1 / 0
        except ZeroDivisionError as cause:
            raise tether.RewardError("reward 'r' raised") from cause
    except tether.RewardError as error:
        lines = error._render_traceback_()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ZeroDivisionError: division by zero", "RewardError: reward 'r' raised"]


def test_numbers_and_lists_of_other_libraries_are_taken():
    import numpy

    assert tether.grpo.Config(group_size=numpy.int64(4), kl_coef=numpy.float64(0.5)).group_size == 4
    assert Sampling(stop=["a"]).stop == ["a"]
