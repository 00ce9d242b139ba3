"""Input drawn at random: configuration files and flags, rows of data, and what a reward function does.

    python -m tests.fuzz [--examples 10000]

runs ``test_fuzz.py``, which says what must hold, on that many new examples in all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))

import numpy
import torch
from hypothesis import strategies as st

from runs import LINES
from tether.commands import TABLE, find
from tether.flags import Option, options_of

# ------------------------------------------------------------------------------------------------- configuration files

OPTIONS = {
    name: {option.name: option for option in options_of(command.options_class())}
    for name in LINES
    if (command := find(name, TABLE))
}
USUAL = {"model": "m", "prompts": "p.jsonl", "pairs": "pairs.jsonl", "data": "texts.jsonl", "reward": "r.py:fn"}
"""What commands need; each takes some of them."""
SHORT = {
    "steps": "2", "rounds": "1", "epochs": "1", "prompts_per_step": "2", "group_size": "2",
    "batch_size": "4", "max_new_tokens": "4", "epochs_per_step": "1", "dynamic_sampling": "1", "reward_retries": "0",
}  # fmt: skip
"""What keeps a run short."""
SCALARS = st.sampled_from([
    # of the type that is asked for, and beyond it
    "", "~", "none", "yes", "off", "true", "False", "0", "-0.0", "-1", "1", "2", "0.5", "1e-300", "-1e-9", "1e30",
    "1e308", "1e309", "9" * 30, "9" * 5000, "0x10", "0x" + "f" * 5000, "0o7", "1_000", "1:30", "1:" * 3000 + "1",
    "1" + ":1" * 400 + ".1", "0001-01-01 00:00:00+05:00",
    ".nan", ".inf", "-.inf", "nan", "inf", "2026-02-30", "2026-01-01", "2026-01-01 00:00:00",
    # YAML
    "[]", "[1, 2]", "[a, b]", "[[1]]", "{}", "{a: 1}", "{a: {b: 1}}", "&a 1", "*a", "!x y", "'", "|\n  a\n  b", "a: b",
    "- a", "\t1", "@", "%", "`", "=", "<<", "!!python/object:os.system {}", "!!python/object/apply:os.system ['true']",
    "!!binary aGk=", "!!binary '%'", "!!set {a}", "!!omap [a: 1]", "!!pairs [a]", "!!int x", "!!int ''", "!!float x",
    "!!bool x", "!!timestamp x", "!!null x", "!!str 1", "!!map 1", "!!seq a", "!!value x",
    # text
    '"\\ud800"', '"\\0"', '"\\e[31m"', '"\\U00110000"', "\0", "\ud800", "\u2028", "x" * 300, "x" * 100_000,
    "1h", "0.001s", "0s", "99999999999d", "1" * 400 + "d", "p.jsonl", "nope", "..", "p.jsonl/x",
    "nobody/nothing", "p.jsonl:train", "https://me:secret@host/file?token=secret", "cpu", "cuda", "meta", "cpu:7",
    "reward", "-kl", "r.py:fn=1e308", "r.py:fn=nan", "r.py:", ":fn",
    "length:3", "length:²", "length:" + "9" * 400, "repetition:" + "9" * 5000, "format:(", "format:a{9999999999}",
    "format:" + "(" * 5000,
])  # fmt: skip
ANYTHING = SCALARS | st.text(st.characters(exclude_characters="/", codec="utf-8"), max_size=20)
KEYS = st.sampled_from(
    ["command", "stepss", "1", "null", "<<", "a b", "? x", "'", "config", "[1, 2]", "{a: b}", "0x" + "f" * 5000]
)
STRAY = st.sampled_from(["--", "-", "--no-quiet", "--step=1", "x", "--out", "--no-such", "\udcff", "--seed=\udcff"])
SPOILT: Sequence[Callable[[bytes], bytes]] = (
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.decode(errors="replace").encode("utf-16"),
    lambda text: text + b"\xe9\xff",
    lambda text: text + b"\0",
    lambda text: text.replace(b"\n", b"\r"),
    lambda text: text.replace(b" ", b"\t"),
    lambda text: b"---\n" + text + b"---\na: 1\n",
    lambda text: b"- " + text,
    lambda text: text[:-3],
    lambda text: text * 2,
    lambda text: b"a: " + b"[" * 5000,
    lambda text: b"? " * 2000,
)
"""A file that was meant well, made worse."""


def fitting(option: Option) -> st.SearchStrategy[str]:
    """Values of an option's own type, sensible ones and others."""
    hint = next((one for one in typing.get_args(option.type) if one is not type(None)), option.type)
    if typing.get_origin(option.type) is Literal:
        return st.sampled_from(typing.get_args(option.type))
    if hint is bool:
        return st.booleans().map(str)
    if hint is int:
        return (st.integers(-1, 5) | st.integers(0, 5) | st.integers()).map(str)
    if hint is float:
        return (st.floats(0, 1) | st.floats(0, 2) | st.floats(allow_nan=False, allow_infinity=False)).map(str)
    return SCALARS


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, bytes, list[str]]:
    """A command, a configuration file, and flags; from well meant to wild."""
    command = draw(st.sampled_from(list(LINES)))
    options, wild = OPTIONS[command], draw(st.integers(0, 3))
    names = st.sampled_from(sorted(options))

    def value(name: str) -> str:
        known = name in options and draw(st.integers(0, 3)) >= wild
        return draw(fitting(options[name]) if known else ANYTHING)

    drawn = draw(st.lists(names if wild < 3 else names | KEYS, max_size=4))
    file = "".join(f"{name.replace('_', draw(st.sampled_from('_-')))}: {value(name)}\n" for name in drawn)
    file = file.encode(errors="surrogatepass")
    if draw(st.integers(0, 5)) < wild - 1:
        file = draw(st.binary() | st.sampled_from(SPOILT).map(lambda spoil: spoil(file)))

    flags = {name: usual for name, usual in USUAL.items() if name in options} | {"out": "out"}
    for name in draw(st.lists(st.sampled_from(sorted(flags)), max_size=wild)):
        flags.pop(name, None)
    kept_short = {name: most for name, most in SHORT.items() if name in options}
    flags |= kept_short if draw(st.integers(0, 7)) else {"model": "nope"}
    flags |= {name: value(name) for name in draw(st.lists(names, max_size=1)) if options[name].type is not bool}
    line = [f"--{name.replace('_', '-')}={text}" for name, text in flags.items()]
    return command, file, line + (draw(st.lists(STRAY, max_size=1)) if wild == 3 else [])


# -------------------------------------------------------------------------------------------------------- rows of data

COLUMNS = {
    "prompts": ("prompt", "answer"),
    "pairs": ("prompt", "chosen", "rejected", "margin"),
    "demonstrations": ("prompt", "completion", "messages", "text"),
}
NEEDED = {"prompts": ("prompt",), "pairs": ("chosen", "rejected"), "demonstrations": ("prompt", "completion")}
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=12)
TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["a", "b", "", " ", "\n\u2003", "\ud800", "\0", "\ufeff", "x" * 60, "<s>", "</s>", "<s><s>a</s></s>", "[assistant]"]
)
ROLES = st.sampled_from(["user", "assistant", "system", "", "\ud800"])
TURN = st.fixed_dictionaries({"role": ROLES, "content": WORDS | TEXT})
TALK = st.lists(TURN, max_size=4) | st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), TEXT))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([10**400, -(10**4000)]), TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
BROKEN_LINES = st.sampled_from([
    b"", b" \t", b"{", b"[]", b"null", b"1", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0", b'{"prompt": "a"} x',
    b'{"prompt": "\xe9"}', b'{"prompt": "\\ud8', b'{"prompt": 1, "prompt": "a"}', b'{"prompt": NaN}', b"[" * 100_000,
    b'{"a":' * 100_000, b'{"answer": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "b": ' + b"[" * 99 + b"]" * 99 + b"}",
    b'{"prompt": "' + b"a" * 100_000 + b'"}', b'{"chosen": "a", "rejected": "b", "margin": 1e999}',
])  # fmt: skip


@st.composite
def files(draw: st.DrawFn, kind: str) -> bytes:
    """Rows of which most could be meant well."""
    good = st.fixed_dictionaries(dict.fromkeys(NEEDED[kind], WORDS | WORDS.map(lambda word: f"{word} {word}")))
    odd = st.dictionaries(st.sampled_from(COLUMNS[kind]), st.one_of(WORDS, TEXT, TALK, VALUES))
    row = (good | st.builds(dict.__or__, good, odd) | odd | st.dictionaries(TEXT, VALUES, max_size=2)).map(
        lambda values: json.dumps(values).encode()
    )
    lines = draw(st.lists(st.one_of(row, row, row, BROKEN_LINES, st.binary(max_size=20)), max_size=8))
    lines += draw(st.lists(st.sampled_from(lines), max_size=2)) if lines else []
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join(lines)


@st.composite
def data(draw: st.DrawFn) -> tuple[str, bytes, bytes, tuple[str, str]]:
    """The kind of rows, a file of them, another that is held out, and what happens to bad and to over-long ones."""
    kind = draw(st.sampled_from(sorted(COLUMNS)))
    policies = st.tuples(st.sampled_from(["fail", "skip", "skip"]), st.sampled_from(["fail", "drop", "truncate"]))
    return kind, draw(files(kind)), draw(files(kind)), draw(policies)


# ------------------------------------------------------------------------------------------- what reward functions do

Act = Callable[[list[list[int]]], Any]
"""What a reward function gives for the token ids of some completions."""


class Hostile:
    """A value that raises at whatever is done with it."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"no {name}")

    def __repr__(self) -> str:
        raise ValueError("no repr")


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


ERRORS = [
    ValueError("one\ntwo\x1b[31m\ud800"), ValueError("x" * 100_000), ValueError(), KeyError("k"), SystemExit(7),
    StopIteration(), GeneratorExit(), KeyboardInterrupt(), RecursionError(), MemoryError(), AssertionError(),
    SpeechlessError(), OSError(5, "I/O"), BaseException("base"), ExceptionGroup("many", [ValueError("a")]),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
]  # fmt: skip
ODD = [
    "1.0", b"1", {"a": 1.0}, {1.0}, object(), 1j, Fraction(1, 3), Hostile(), type, range(3), "x" * 100_000, (), [],
    [None], [[1.0]], numpy.float32(0.5), numpy.float64("nan"), numpy.int64(3), numpy.bool_(True), numpy.array(2.0),
    numpy.array([1.0]), numpy.array(["a"]), numpy.array([[1.0, 2.0]]), torch.tensor(1.5), torch.ones(2, 2),
    torch.tensor([1.0, float("inf")]), torch.tensor(1.0, requires_grad=True), torch.empty(1, device="meta"),
]  # fmt: skip
NUMBER = st.floats(-3, 3) | st.integers(-3, 3) | st.booleans()
HUGE = st.floats() | st.sampled_from([1e308, -1e308, 1e39, -1e39, 1e20, 10**400, 2**1023, -(2**1024), 5e-324])
ANY = st.one_of(NUMBER, HUGE, st.none(), st.sampled_from(ODD))


def each(values: list[Any]) -> Act:
    """A value for each completion, in turn."""
    return lambda completions: [value for value, _ in zip(itertools.cycle(values), completions, strict=False)]


def each_token(values: list[Any], extra: int) -> Act:
    """For each completion a list of as many values as it has tokens, and ``extra``."""
    return lambda completions: [
        list(itertools.islice(itertools.cycle(values), len(ids) + extra)) for ids in completions
    ]


def raises(error: BaseException) -> Act:
    def act(_: list[list[int]]) -> Any:
        raise error

    return act


def breaks_off(_: list[list[int]]) -> Iterator[float]:
    yield 1.0
    raise ValueError("half-way")


def empties(completions: list[list[int]]) -> list[float]:
    values = [1.0] * len(completions)
    completions.clear()
    return values


async def waits(completions: list[list[int]]) -> list[Any]:
    return [numpy.float32(1.0)] * len(completions)


def never_ends(_: list[list[int]]) -> Iterator[float]:
    return itertools.repeat(1.0)


ACTS: st.SearchStrategy[Act] = st.one_of(
    st.lists(NUMBER | st.none(), min_size=1, max_size=4).map(each),
    st.lists(NUMBER | HUGE, min_size=1, max_size=4).map(each),
    st.lists(ANY, min_size=1, max_size=4).map(each),
    st.builds(each_token, st.lists(NUMBER | HUGE, min_size=1, max_size=3), st.sampled_from([0, 0, 0, 1, -1])),
    st.builds(each_token, st.lists(ANY, min_size=1, max_size=3), st.just(0)),
    (st.lists(ANY, max_size=6) | ANY).map(lambda value: lambda _: value),
    st.lists(NUMBER, max_size=6).map(lambda values: lambda _: (value for value in values)),
    st.sampled_from([numpy.ones, torch.ones]).map(lambda make: lambda completions: make(len(completions))),
    st.sampled_from([breaks_off, empties, waits, never_ends]),
    st.sampled_from(ERRORS).map(raises),
)
PLAN: dict[int, Act] = {}
"""What :func:`reward` does in its next calls, one after the other; after them it gives the completions' lengths."""


def reward(completion_ids: list[list[int]], **_: Any) -> Any:
    act = PLAN.pop(min(PLAN, default=0), None)
    return act(completion_ids) if act else [float(len(ids)) for ids in completion_ids]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10000, help="in all (default 10000)")
    environment = {**os.environ, "TETHER_FUZZ_EXAMPLES": str(parser.parse_args().examples)}
    file = Path(__file__).with_name("test_fuzz.py")
    line = [sys.executable, "-m", "pytest", "-q", "--durations=0", "--hypothesis-show-statistics", str(file)]
    return subprocess.run(line, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
